"""The model as a graph of layers, laid out and drawn in the colours of partitions."""
