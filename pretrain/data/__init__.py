"""Samples to tensors: readers, transforms and loaders of a step."""
