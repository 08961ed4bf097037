"""Anomalies, hangs, progress and timing of a run."""
