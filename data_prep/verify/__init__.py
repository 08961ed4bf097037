"""Verification and repair of finished datasets."""
