"""How many floating-point operations a model needs for a document."""
