"""Evaluation of contrastive models: metrics with intervals, reports, embeddings and search."""
