"""Evaluation tasks: what each one reads and measures."""
