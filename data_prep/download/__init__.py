"""Polite, cached download of media from web addresses."""
