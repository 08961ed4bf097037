"""Encoders from Isopair, open_clip and Hugging Face checkpoints."""
