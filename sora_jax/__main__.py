"""The command `sora-jax`, which is also `python -m sora_jax`."""

import sys


def main() -> int:
    """Runs the command line and returns its exit code; see `cli.main`."""
    try:
        from sora_jax import cli
    except KeyboardInterrupt:  # nothing has begun
        print("sora-jax: error: interrupted", file=sys.stderr)
        return 130
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
