"""The training loop, its steps and memory budget."""
