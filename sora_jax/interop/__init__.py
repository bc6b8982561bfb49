"""Reading published checkpoints into this project's parameters: nothing here is a second implementation."""
