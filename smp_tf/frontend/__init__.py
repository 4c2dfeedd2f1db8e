"""Reads TensorFlow: turns a step function into a ``plan.graph.Graph``."""
