"""Files with a step of the exit left out: frames without mark and signature, and the signature alone."""

from pathlib import Path

from sora_jax import media
from sora_jax.safety import provenance


def write(path, frames, fps):
    path = Path(path)
    path.write_bytes(media.encode(frames, fps, path.suffix))
    return path


def sign(source, target, claim, signer):
    target = Path(target)
    target.write_bytes(provenance.sign(Path(source).read_bytes(), target.suffix, claim, signer))
