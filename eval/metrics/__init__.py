"""Evaluation metrics on embeddings, with confidence intervals."""
