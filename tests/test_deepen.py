import numpy as np
import pytest
from scripts import script

from sora_jax.models import load, read_config


@pytest.fixture(scope="module")
def deepen():
    return script("experiments/deepen.py")


def test_a_deeper_model_computes_the_same(deepen, tiny_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "deeper"
    monkeypatch.setattr("sys.argv", ["deepen.py", str(tiny_folder), str(out), "--layers", "0,0,1,1,1"])
    deepen.main()
    assert capsys.readouterr().out.strip() == str(out)
    assert read_config(out).dit.layers == 5
    before, after = (load(folder).generate("a red ball", progress=False).frames for folder in (tiny_folder, out))
    assert np.array_equal(before, after)
    blocks = load(out).params["dit"]["blocks"]
    assert np.array_equal(blocks["up"]["kernel"][2], blocks["up"]["kernel"][4])  # copies of what leads to the zeros
    assert [bool(kernel.any()) for kernel in blocks["down"]["kernel"]] == [True, False, True, False, False]


@pytest.mark.parametrize("layers", ["0,2", "1", "1,0", "0,x"])
def test_other_layers_are_refused(deepen, tiny_folder, tmp_path, monkeypatch, layers):
    out = tmp_path / "deeper"
    monkeypatch.setattr("sys.argv", ["deepen.py", str(tiny_folder), str(out), "--layers", layers])
    with pytest.raises(SystemExit) as ended:
        deepen.main()
    assert ended.value.code == 2 and not out.exists()
