"""Optimizer, parameter groups and the learning rate of every step."""
