"""Captioning: tokens of towers, and text decoders that attend to them."""
