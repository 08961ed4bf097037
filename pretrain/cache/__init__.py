"""Node-local shard cache: prefetch and eviction."""
