"""Callbacks that add figures to the logs."""

import tensorflow as tf


class Figures(tf.keras.callbacks.Callback):
    """``fit`` calls it before all others, so that they see what it adds: the progress
    bar, ``History``, a ``CSVLogger``. What it adds must be the same on every rank."""
