"""Signed files with damage of all kinds, at random: reading them never fails, hangs, or passes with other pixels."""

import contextlib
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sora_jax import media
from sora_jax.errors import InputError
from sora_jax.safety.keys import load_signer
from sora_jax.safety.manifest import read_manifest
from sora_jax.safety.verify import EXIT_CODES, verify

sys.path.append(str(Path(__file__).parents[2] / "experiments"))
import provenance_matrix as matrix  # noqa: E402
import tampering  # noqa: E402


@pytest.fixture
def signer(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return load_signer()


def mutants(files, number, seed):
    """Damaged copies of files: flipped, cut, doubled, moved, mixed, most of them outside the manifest."""
    random = np.random.default_rng(seed)
    names = sorted(files)
    for _ in range(number):
        name = names[random.integers(len(names))]
        data = bytearray(files[name])
        for _ in range(random.integers(1, 4)):
            parts = tampering.regions(files[name], name.split(".")[1])
            _, start, end = parts[random.integers(len(parts))]
            at = int(random.integers(start, min(end, len(data)))) if start < len(data) else 0
            size = int(random.integers(1, 2 ** random.integers(1, 12)))
            kind = random.integers(8)
            if kind < 2:
                data[at : at + 1] = bytes([data[at] ^ 1 << random.integers(8)]) if data else b""
            elif kind == 2:
                data[at : at + size] = random.bytes(len(data[at : at + size]))
            elif kind == 3:
                del data[at : at + size]
            elif kind == 4:
                data[at:at] = data[start : start + size] if random.integers(2) else random.bytes(size)
            elif kind == 5:
                data[at : at + 4] = int(random.choice([0, 1, 7, 8, 2**31, 2**32 - 1])).to_bytes(4, "big")
            elif kind == 6:
                other = files[names[random.integers(len(names))]]
                data[at : at + size] = other[at : at + size]
            elif random.integers(4) == 0:
                del data[at:]
        yield name, bytes(data)


def fuzz(folder, signer, number, seed):
    """The states of damaged files; fails if one takes long, raises, or passes with other pixels.

    Of every fortieth all is asked that `verify` says. That takes twenty times as long, to look for the mark.
    """
    files = {f"x.{format}": matrix.make_signed(folder, format, signer).read_bytes() for format in matrix.FORMATS}
    before = {}
    for name, data in files.items():
        (folder / name).write_bytes(data)
        before[name] = tampering.look(folder / name)
    found = dict.fromkeys(EXIT_CODES, 0)
    for count, (name, data) in enumerate(mutants(files, number, seed)):
        path = folder / name
        path.write_bytes(data)
        start = time.perf_counter()
        if count % 40 == 0:
            manifest = verify(path).manifest
        else:
            manifest = read_manifest(path, signer.anchor)
            with contextlib.suppress(InputError):
                media.read(path)
        seconds = time.perf_counter() - start
        # A size of frames that comes for the first time is compiled for.
        assert seconds < (2 if count % 40 else 5), (name, seconds)
        found[manifest.state] += 1
        if manifest.state in matrix.INTACT:
            assert tampering.pixels(path, before[name]) == "same"
    return found


def test_damaged_files(tmp_path, signer):
    found = fuzz(tmp_path, signer, 600, seed=0)
    assert found["tampered"] > 100 and found["unreadable"] > 100, found


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_ten_thousand_damaged_files(tmp_path, signer, seed):
    found = fuzz(tmp_path, signer, 2500, seed)
    assert found["tampered"] > 250 and found["unreadable"] > 250, found
