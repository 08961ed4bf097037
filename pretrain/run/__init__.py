"""The run folder: attempts, requests, forks and compatibility checks."""
