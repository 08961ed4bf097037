"""Health checks of the nodes of a job."""
