"""Local and remote files: atomic writes, transfers, retries."""
