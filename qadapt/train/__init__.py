"""Optimizer, schedule, step, loop, checkpoint."""
