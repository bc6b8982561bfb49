"""The scripts that make the README's picture, measure the mark and fit the prompt gate run to their end."""

import hashlib

import numpy as np
import pytest
import safetensors.numpy
from scripts import script

from sora_jax import media


@pytest.fixture
def run(monkeypatch):
    """Runs a script's `main` with words of a command line."""

    def run(module, *words):
        monkeypatch.setattr("sys.argv", [module.__name__, *map(str, words)])
        module.main()

    return run


@pytest.mark.slow
def test_the_moving_picture_of_the_readme(run, tmp_path):
    module = script("experiments/readme_samples.py")
    module.PROMPTS, module.COLUMNS = module.PROMPTS[:2], 2
    run(module, tmp_path / "samples.gif")
    frames_THWC, fps = media.read(tmp_path / "samples.gif")
    assert frames_THWC.shape[1:] == (128, 256, 3) and len(frames_THWC) > 1 and fps == pytest.approx(8, rel=0.05)
    left, right = np.split(frames_THWC.astype(float), 2, axis=2)
    assert np.abs(left - right).mean() > 1  # of two prompts


@pytest.mark.slow
def test_the_mark_is_measured(run, capsys):
    run(script("experiments/mark_robustness.py"), "--num", 2, "--keys", 2, "--frames", 9)
    said = capsys.readouterr().out
    assert "2 clips of 9 frames of 128x128" in said and "Unmarked clips under random keys: 0 of 2 found" in said
    assert "| none | 2 of 2 |" in said
    assert said.count("of 2 |") == len(script("experiments/mark_robustness.py").CHANGES)


@pytest.mark.slow
def test_the_gate_is_fitted_to_its_examples(run, tmp_path, monkeypatch):
    """Here to a fraction of them; the fit to all is in the package, where tests/safety measures it."""
    module = script("experiments/fit_gate.py")
    shipped = module.DATA
    for name in ("names.txt", "policy.toml", "vocab.txt"):
        (tmp_path / name).write_bytes((shipped / name).read_bytes())
    examples = [one for one in module.read_examples() if len(one[2]) < 60][::40]
    monkeypatch.setattr(module, "DATA", tmp_path)
    monkeypatch.setattr(module, "read_examples", lambda: examples)
    run(module)
    found = safetensors.numpy.load_file(tmp_path / module.CLASSIFIER)
    want = safetensors.numpy.load_file(shipped / module.CLASSIFIER)
    assert {name: (part.shape, part.dtype) for name, part in found.items()} == {
        name: (part.shape, part.dtype) for name, part in want.items()
    }
    classes = [*sorted({one[0] for one in examples} - {module.BENIGN}), module.BENIGN]
    encode = module.encoder()
    texts = [module.windows(module.forms(text).original)[0] for _, _, text in examples]
    words = module.words_of([encode.tokens(text) for text in texts]) / module.WORDS
    odds = encode(texts) @ found["weight"] + words @ found["words"].astype(np.float32) + found["bias"]
    chosen = np.argmax(np.concatenate([odds, np.zeros((len(odds), 1))], axis=1), axis=1)
    assert np.mean([classes[i] == one[0] for i, one in zip(chosen, examples, strict=True)]) > 0.95
    digests = dict(line.split()[::-1] for line in (tmp_path / module.SUMS).read_text().splitlines())
    assert digests.keys() == {path.name for path in tmp_path.iterdir()} - {module.SUMS}
    assert all(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == one for name, one in digests.items())
