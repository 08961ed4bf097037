"""Subsets of a dataset by conditions on columns and scores."""
