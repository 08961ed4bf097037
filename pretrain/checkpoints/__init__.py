"""Sharded checkpoints: tensor slices, record, writing and restoring."""
