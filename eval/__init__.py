"""Checkpoint to numbers: zero-shot classification and retrieval, with intervals and a report."""
