"""Measuring how well videos follow their prompts, by reading the frames alone."""
