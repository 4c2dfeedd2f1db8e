"""Scripts on real data, as a user writes them; run with `python -m`."""
