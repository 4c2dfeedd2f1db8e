"""Moving tensors and objects between ranks."""
