"""Exact contrastive losses over the global batch, tile by tile."""
