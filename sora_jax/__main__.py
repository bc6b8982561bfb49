"""`python -m sora_jax`: the same as the command `sora-jax`."""

import sys

from sora_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
