"""Timelines: files of ranks, what was measured and planned, pictures and pages."""
