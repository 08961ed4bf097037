"""Pairs to shards: turns manifests and folders of media into verified WebDataset tars."""
