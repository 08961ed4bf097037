"""Accelerate and DeepSpeed engines, collectives and launchers."""
