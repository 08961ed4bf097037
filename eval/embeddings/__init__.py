"""Embeddings of media and texts, computed by all processes and cached on disk."""
