"""Teachers of distillation: models of any library, and the inputs that they read."""
