"""Decoding, checking, re-encoding and fingerprinting of images and audio."""
