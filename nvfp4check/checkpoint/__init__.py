"""Checkpoints: opened, described, validated, compared."""
