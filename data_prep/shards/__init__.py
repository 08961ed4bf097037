"""The shard format: tars, index, manifest, columns and subsets."""
