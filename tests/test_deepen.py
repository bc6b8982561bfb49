import numpy as np
import pytest
from scripts import script

from sora_jax.models import load, read_config


@pytest.fixture(scope="module")
def deepen():
    return script("experiments/deepen.py")


@pytest.mark.parametrize("part,layers", [("dit", "0,0,1,1,1"), ("text", "0,0,0")])
def test_a_deeper_model_computes_the_same(deepen, tiny_folder, tmp_path, monkeypatch, capsys, part, layers):
    out = tmp_path / "deeper"
    monkeypatch.setattr("sys.argv", ["deepen.py", str(tiny_folder), str(out), "--layers", layers, "--part", part])
    deepen.main()
    assert capsys.readouterr().out.strip() == str(out)
    layers = layers.split(",")
    assert getattr(read_config(out), part).layers == len(layers)
    before, after = (load(folder).generate("a red ball", progress=False).frames for folder in (tiny_folder, out))
    assert np.array_equal(before, after)
    blocks = load(out).params[part]["blocks"]
    assert np.array_equal(blocks["up"]["kernel"][-2], blocks["up"]["kernel"][-1])  # copies of what leads to the zeros
    first = [layer not in layers[:number] for number, layer in enumerate(layers)]
    assert [bool(kernel.any()) for kernel in blocks["down"]["kernel"]] == first


@pytest.mark.parametrize("layers", ["0,2", "1", "1,0", "0,x"])
def test_other_layers_are_refused(deepen, tiny_folder, tmp_path, monkeypatch, layers):
    out = tmp_path / "deeper"
    monkeypatch.setattr("sys.argv", ["deepen.py", str(tiny_folder), str(out), "--layers", layers])
    with pytest.raises(SystemExit) as ended:
        deepen.main()
    assert ended.value.code == 2 and not out.exists()
