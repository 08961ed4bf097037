"""Probe of towers before training: each is run as training will run it."""
