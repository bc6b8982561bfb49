"""Clips with captions to learn from."""
