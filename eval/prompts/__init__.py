"""Class names and prompts, and class embeddings of prompt ensembles."""
