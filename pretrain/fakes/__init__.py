"""Models of fake tensors, which have shapes and types but no values."""
