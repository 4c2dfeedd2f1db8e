"""Keras models that are split over ranks."""
