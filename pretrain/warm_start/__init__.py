"""Warm starts: weights of other models and runs as the first weights of a tower."""
