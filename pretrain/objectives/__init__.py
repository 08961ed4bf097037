"""Training objectives, one module each: config section, loss and metrics."""
