"""Checkpoints of the whole model, in parts."""
