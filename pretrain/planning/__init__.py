"""Plans of runs without data, weights or GPUs: FLOPs, memory, traffic, time and checkpoints."""
