"""Exact, near and semantic duplicates within and across datasets."""
