"""What the TPU's own compiler says, where it is installed (the extra `tpu`)."""

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripts import script

from sora_jax import media, plan
from sora_jax import mesh as mesh_lib
from sora_jax.attention import self_attention
from sora_jax.cli import main
from sora_jax.errors import InputError
from sora_jax.interop.presets import PRESETS
from sora_jax.model_config import abstract_params

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: sora-jax[tpu]"
)
DIT = PRESETS["wan2.1-t2v-1.3b"].dit
PARAMETERS = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(PRESETS["wan2.1-t2v-1.3b"])["dit"]))
TOKENS = 21 * 30 * 52  # of 81 frames of 480x832


@pytest.fixture
def chips(monkeypatch):
    """The devices of a topology, none of which is there. (No TPU is looked for: see `compile_part`.)"""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    return lambda topology: topologies.get_topology_desc(topology, platform="tpu").devices


def step_of_wan(topology: str, mesh: str) -> plan.Need:
    return plan.compile_part(plan.Job("wan2.1-t2v-1.3b", "denoise", topology, mesh, (480, 832), 81))


def test_a_step_of_wan_holds_its_parameters_and_no_scores():
    need = step_of_wan("v6e:1x1", "data=1")
    assert not need.error and need.collectives == {}
    assert need.arguments == pytest.approx(2 * PARAMETERS, rel=0.03)  # bfloat16, but for some small ones; inputs
    assert need.arguments < need.hbm == need.arguments + need.heap
    # The largest activation is that of the feed-forward layer; the scores of all heads would be forty times as much.
    largest = 2 * TOKENS * DIT.feed_forward
    assert 0.5 * largest < need.heap < 3 * largest
    assert 2 * DIT.heads * TOKENS**2 > 40 * largest


def test_four_chips_send_what_the_documents_of_attention_say():
    """On the links, too, by the compiled program: tokens by Ulysses and each layer's parameters, both branches once."""
    need = step_of_wan("v6e:2x2", "context=4")
    assert not need.error
    share = 2 * TOKENS // 4 * DIT.width
    assert need.collectives["all-to-all"] == DIT.layers * 2 * 4 * share * 3 / 4
    assert need.collectives["all-gather"] == pytest.approx(3 / 4 * 2 * PARAMETERS, rel=0.03)
    assert need.collectives.keys() == {"all-to-all", "all-gather"}
    assert need.arguments == pytest.approx(2 * PARAMETERS / 4, rel=0.08)


@pytest.mark.parametrize(
    "model,topology,mesh,size,aim",
    [
        ("wan2.1-t2v-14b", "v6e:2x4", "context=8", (720, 1280), 5.0),
        ("wan2.1-t2v-14b", "v5p:2x2x2", "context=8", (720, 1280), 5.0),
        ("wan2.1-t2v-1.3b", "v6e:1x1", "data=1", (480, 832), 3.7),
    ],
)
def test_a_step_of_81_frames_needs_no_more_hbm_than_docs_plan_says(model, topology, mesh, size, aim):
    need = plan.compile_part(plan.Job(model, "denoise", topology, mesh, size, 81))
    assert not need.error and need.hbm < aim * plan.GIB
    assert sum(need.collectives.values()) < 50 * plan.GIB


@pytest.mark.parametrize("topology,fits", [("v5e:1x1", False), ("v5p:1x1x1", True)])
def test_the_state_of_training_fits_or_not(topology, fits, capsys):
    """Parameters, their average and the two of AdamW, float32: 21 GiB, of 15.75 and of 95.74."""
    words = ["--topology", topology, "--size", "480x832", "--frames", "5", "--batch", "1"]
    assert main(["plan", "--train", "--model", "wan2.1-t2v-1.3b", *words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    need = answer["parts"]["train"]
    assert need["arguments"] == pytest.approx(16 * PARAMETERS, rel=0.01)
    assert need["arguments"] < need["hbm"] < 2 * need["arguments"]
    assert answer["fits"] == fits
    said = f"{need['hbm'] / plan.GIB:.2f} of {answer['chip']['hbm'] / plan.GIB:.1f} GiB a chip"
    assert answer["verdict"].startswith(f"{'fits' if fits else 'does not fit'}: {said}")


def test_the_bundled_model_fits_on_four_chips(capsys):
    assert main(["plan", "--model", "bundled", "--topology", "v5e:2x2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["verdict"].startswith("fits") and answer["mesh"] == "data=1,context=4,tensor=1"
    for need in answer["parts"].values():
        assert need["arguments"] > 0 and need["heap"] > 0 and need["operations"] > 0
    assert {"all-to-all", "all-gather"} <= answer["parts"]["denoise"]["collectives"].keys()


@pytest.mark.parametrize("topology,number", [("v5p:1x1x1", 1), ("v6e:1x2", 2), ("v5p:1x2x1", 2), ("v4:2x2x1", 4)])
def test_slices_of_all_sizes_and_kinds_are_planned(topology, number):
    assert plan.compile_part(plan.Job("bundled", "text", topology, f"context={number}", (128, 128), 17)).hbm > 0


def test_a_mesh_that_is_none_is_an_input_error():
    with pytest.raises(InputError, match="does not multiply"):
        plan.compile_part(plan.Job("bundled", "text", "v5e:2x2", "data=3", (128, 128), 17))


@pytest.mark.parametrize(
    "axis,sizes",
    [(2, dict(data=1, context=16)), (2, dict(data=4, context=4)), (0, dict(data=4, context=4))],
)
def test_neighbours_along_an_axis_are_neighbours_in_the_slice(axis, sizes, chips):
    mesh = mesh_lib.make_mesh(**sizes, devices=chips("v5e:4x4"))
    places = np.array([chip.coords for chip in mesh.devices.flat]).reshape(sizes["data"], 1, sizes["context"], 1, 3)
    assert (np.abs(np.diff(places, axis=axis)).sum(-1) == 1).all()


@pytest.mark.parametrize("topology,forwards", [("v5e:2x2", True), ("v6e:2x2", False)])
def test_the_pallas_kernel_compiles_to_the_end(topology, forwards, chips):
    """Forwards alone, or for training; a step of Wan is compiled without generating code, which may still fail."""
    mesh = mesh_lib.make_mesh(context=4, devices=chips(topology))
    place = jax.NamedSharding(mesh, jax.P(None, None, None, "context"))
    heads = jax.ShapeDtypeStruct((1, DIT.heads, 21, 30 * 52, DIT.head_width), jnp.bfloat16, sharding=place)

    def total(*inputs):
        return self_attention(*inputs).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        function = self_attention if forwards else jax.grad(total, argnums=(0, 1, 2))
        compiled = jax.jit(function).lower(heads, heads, heads).compile()
    assert compiled.as_text().count("tpu_custom_call") >= (1 if forwards else 2)
    scores = 2 * DIT.heads // 4 * TOKENS**2
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 4


def test_a_compiler_ends_with_whoever_asked_it():
    job = plan.Job("bundled", "denoise", "v6e:1x1", "data=1", (128, 128), 17)
    command = [sys.executable, "-m", "sora_jax.plan", json.dumps(dataclasses.asdict(job))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        out, _ = child.communicate(timeout=60)  # closes the pipe that the parent's end would close
    assert child.returncode == 1 and not out


def test_the_reports_of_plans(tmp_path, monkeypatch):
    def run(module, path):
        monkeypatch.setattr("sys.argv", [module.__name__, "-o", str(path)])
        module.main()

    module = script("experiments/plan_report.py")
    module.CASES = (("bundled", "v6e:1x1", (32, 32), 5), ("bundled", "v6e:1x1", (32, 32), 9, {"window": 5}))
    module.TRAINING = ()
    run(module, tmp_path / "plan.md")
    rows = [line for line in (tmp_path / "plan.md").read_text().splitlines() if line.startswith("| bundled")]
    assert len(rows) == 2 and all("fits" in row for row in rows) and "--window 5" in rows[1]

    module = script("experiments/scaling_report.py")
    module.TOKENS_MODEL = module.CHIPS_MODEL = "bundled"
    module.TOKENS, module.CHIPS, module.FRAMES, module.SIZE = ((5, (32, 32)),), ("v6e:1x1", "v6e:2x2"), 5, (64, 64)
    run(module, tmp_path / "scaling.md")
    assert (tmp_path / "scaling.md").read_text().count("GiB | ") >= 3
    assert media.read(tmp_path / "scaling.png")[0].shape[0] == 1
