"""The model that comes out."""
