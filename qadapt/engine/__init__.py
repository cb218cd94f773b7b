"""Torch only: what happens inside a step. Knows no recipe, no file, no screen."""
