"""Synthetic images, sounds and captions of the demo."""
