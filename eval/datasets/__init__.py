"""Evaluation datasets: shards, tars, class folders, tables and downloads."""
