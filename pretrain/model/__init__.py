"""Towers, tokenizers and the contrastive model."""
