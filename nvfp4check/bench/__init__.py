"""Measurements and exhaustive runs: commands, never tests. `python -m nvfp4check.bench`."""
