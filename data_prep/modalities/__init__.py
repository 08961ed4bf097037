"""Names and kinds of modalities, and vectors as arrays with their statistics."""
