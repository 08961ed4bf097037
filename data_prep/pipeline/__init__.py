"""Scan, plan and write: from source rows to finished shards."""
