"""Procedural worlds: scenes sampled from a key, drawn in JAX with their ground truth, and captioned."""
