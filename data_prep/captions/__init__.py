"""Caption cleaning and filtering."""
