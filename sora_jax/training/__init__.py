"""Training: state, tasks (codec, dit), checkpoints and the loop that turns one into the other."""
