"""Data parallelism: replicas of the model train on different batches."""
