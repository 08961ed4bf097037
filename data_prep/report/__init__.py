"""Data sheets and duplicate reports as HTML."""
