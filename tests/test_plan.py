"""What a plan counts and says. Whether a program fits is the TPU compiler's word: see `test_tpu_compiler.py`."""

import dataclasses
import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from sora_jax import mesh as mesh_lib
from sora_jax import mesh_choice, plan
from sora_jax.cli import main
from sora_jax.counting import count_collectives, count_operations
from sora_jax.dit import DiT
from sora_jax.errors import InputError
from sora_jax.interop.presets import PRESETS
from sora_jax.model_config import abstract_params
from sora_jax.plan.job import CHIPS
from sora_jax.plan.programs import spared, steps

LAST = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize(
    "function",
    [
        lambda: (lambda a, b: a @ b, jnp.zeros((8, 16)), jnp.zeros((16, 32))),
        lambda: (
            lambda x, k: jax.lax.conv_general_dilated(
                x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            ),
            jnp.zeros((1, 9, 9, 4)),
            jnp.zeros((3, 3, 4, 8)),
        ),
        lambda: (lambda q, k, v: jax.nn.dot_product_attention(q, k, v), *[jnp.zeros((1, 64, 2, 16))] * 3),
    ],
    ids=["product", "convolution", "attention"],
)
def test_operations_are_those_the_compiler_counts(function):
    function, *inputs = function()
    counted = count_operations(jax.make_jaxpr(function)(*inputs).jaxpr)
    compiled = jax.jit(function).lower(*inputs).compile().cost_analysis()["flops"]
    # The compiler also counts what is done element by element.
    assert 0.85 * compiled < counted <= compiled


def test_a_loop_counts_as_often_as_it_runs_but_the_steps_once():
    def scan(length):
        return lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, None, length)[0]

    def both(x):
        return jax.lax.scan(lambda x, _: (scan(5)(x), None), x, None, 3)[0]

    x = jnp.zeros((4, 4))
    one = 2 * 4**3
    assert count_operations(jax.make_jaxpr(scan(5))(x).jaxpr) == 5 * one
    assert count_operations(jax.make_jaxpr(both)(x).jaxpr) == 15 * one
    assert count_operations(jax.make_jaxpr(both)(x).jaxpr, steps=3) == 5 * one


def test_a_step_of_wan_costs_what_its_sizes_say():
    """2 operations per parameter of the blocks and token, and attention: 4 N^2 D for each layer and video."""
    config = dataclasses.replace(PRESETS["wan2.1-t2v-1.3b"].dit, layers=1)
    D, M, N, L = config.width, config.feed_forward, 21 * 30 * 52, 512
    shapes = (1, 21, 60, 104, 16), (1, 21), (1, L, 4096)
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    params = jax.eval_shape(DiT(config).init, jax.random.key(0), *inputs)
    counted = count_operations(jax.make_jaxpr(DiT(config).apply)(params, *inputs).jaxpr)
    products = 2 * N * (4 * D * D + 2 * D * D + 2 * D * M) + 2 * L * 2 * D * D
    attention = 4 * N * (N + L) * D
    # Beside the block: patches, text and levels, and heads turned by position.
    assert products + attention < counted < 1.02 * (products + attention)


HLO = """HloModule jit_planned
%inside (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %gather = bf16[64,16]{1,0} all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %swap = f32[8,4]{1,0} collective-permute(%y), source_target_pairs={{0,1}}
}
%until (p: (s32[], f32[8,4])) -> pred[] {
  %n = s32[]{:T(128)} constant(10)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%steps (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %loop = (s32[], f32[8,4]) while(%t), condition=%until, body=%inside
}
%twice (p: (s32[], f32[8,4])) -> pred[] {
  %n2 = s32[] constant(2)
}
%small (q: f32[8,4]) -> f32[8,4] {
  %scatter = f32[2,4]{1,0} reduce-scatter(%q), replica_groups={}, to_apply=%add
}
%large (q: f32[8,4]) -> f32[8,4] {
  %scatter2 = f32[4,4]{1,0} reduce-scatter(%q), replica_groups={}, to_apply=%add
}
%all-reduce-scatter (q: f32[8,4]) -> f32[2,4] {
  %sum2 = f32[8,4]{1,0} all-reduce(%q), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = f32[2,4]{1,0} dynamic-slice(%sum2, %i, %zero), dynamic_slice_sizes={2,4}
}
ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %fused = f32[2,4]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter
  %sum = f32[8,4]{1,0} all-reduce(%a), replica_groups=[2,4]<=[8], to_apply=%add
  %loop2 = (s32[], f32[8,4]) while(%t), condition=%twice, body=%steps
  %either = f32[8,4]{1,0} conditional(%p, %a, %a), true_computation=%small, false_computation=%large
  %all = (f32[8,4]{1,0}, f32[32,4]{1,0}) all-gather-start(%a), replica_groups=mesh['x'=2,'y'=4] {'y'}
}
"""


def test_collectives_are_counted_by_what_arrives():
    gather, swap, total, start = 64 * 16 * 2 * 3 / 4, 8 * 4 * 4, 2 * 8 * 4 * 4 * 3 / 4, 32 * 4 * 4 * 3 / 4
    assert count_collectives(HLO, steps=2, chips=8) == {
        "all-gather": 10 * gather + start,
        "collective-permute": 10 * swap,
        "all-reduce": total,
        "reduce-scatter": 4 * 4 * 4 * 7 + 8 * 4 * 4 * 3 / 4,  # that of the larger branch, and the fused one
    }
    assert count_collectives(HLO)["collective-permute"] == 20 * swap


@pytest.mark.parametrize("topology", ["v6e", "v6e:8", "v9:2x4", "v6e:2x4x", "v6e:0x4", ""])
def test_topologies_that_do_not_exist_are_refused(topology, capsys):
    assert main(["plan", "--model", "bundled", "--topology", topology]) == 2
    assert "such as v6e:2x4" in capsys.readouterr().err


def test_a_slice_has_the_sides_and_the_links_of_its_kind(capsys):
    """Links, of all that a chip has: along a side of two chips one, of more two, and of a single chip none."""
    for topology, share in {
        "v6e:1x1": 0,
        "v6e:2x4": 3 / 4,
        "v5e:4x4": 1,
        "v5p:2x2x1": 2 / 6,
        "v4:2x2x4": 4 / 6,
    }.items():
        chip, number = plan.chips(topology)
        whole = CHIPS[topology.partition(":")[0]]
        assert chip == dataclasses.replace(whole, interconnect=pytest.approx(whole.interconnect * share))
        assert number == math.prod(map(int, topology.partition(":")[2].split("x")))
    assert plan.Need(operations=1e12).bounds(plan.chips("v6e:1x1")[0])["interconnect"] == 0
    for topology, right in {"v6e:2x2x2": "v6e:2x4", "v5e:2x2x1": "v5e:2x4", "v5p:2x4": "v5p:2x2x2"}.items():
        assert main(["plan", "--model", "bundled", "--topology", topology]) == 2
        assert f"such as {right}" in capsys.readouterr().err


def test_a_slice_that_nobody_lets_is_told():
    for topology, words in {
        "v6e:4x8": "",
        "v6e:3x3": "v6e:3x3 is not among the slices that are listed: 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16",
        "v5p:2x2x4": "",
        "v5p:4x8x12": "",
        "v5p:1x1x1": "2x4x4 and multiples of 4x4x4",
    }.items():
        job = plan.Job("bundled", "text", topology, "data=1", (128, 128), 33)
        last = plan.describe(job, {"text": plan.Need()}, 1).splitlines()[-1]
        assert last.endswith(words) if words else "listed" not in last
        assert plan.for_scripts(job, {"text": plan.Need()}, 1)["unlisted"] == (last if words else "")


def test_training_on_a_mesh_that_does_not_divide_the_heads_is_an_input_error():
    job = plan.Job("wan2.1-t2v-1.3b", "train", "v6e:2x4", "tensor=8", (480, 832), 81)
    with pytest.raises(InputError, match="cannot divide 12 heads"):
        plan.program(job, AbstractMesh((1, 1, 1, 8), mesh_lib.AXES))


def test_a_training_step_multiplies_what_its_kernels_do():
    """Blocks are recomputed: four times the forward pass, but of attention two products twice and five backwards."""
    job = plan.Job("wan2.1-t2v-1.3b", "train", "v6e:1x1", "data=1", (480, 832), 33, batch=2)
    mesh = AbstractMesh((1, 1, 1, 1), mesh_lib.AXES)
    counted = {}
    for part, batch in (("train", 2), ("denoise", 1)):
        here = dataclasses.replace(job, part=part, batch=batch)
        function, arguments, _ = plan.program(here, mesh)
        local = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
        counted[part] = count_operations(jax.make_jaxpr(function)(*local).jaxpr, steps(here)) - spared(here)
    dit, N = PRESETS[job.model].dit, 9 * 30 * 52
    attention = dit.layers * 4 * N**2 * dit.width
    forwards = counted["denoise"] / 2  # of one clip: a denoising step has two branches
    assert counted["train"] == pytest.approx(2 * (4 * (forwards - attention) + 4.5 * attention), rel=0.01)
    assert spared(job) == 2 * attention / 2 > 0.03 * counted["train"]


@pytest.mark.parametrize(
    "words,message",
    [
        (["--model", "wan3"], "neither a model folder nor one of bundled, wan2.1-t2v-1.3b"),
        (["--model", "bundled", "--size", "100x128"], "height must be a multiple of 32"),
        (["--model", "bundled", "--frames", "16"], "frames must be 1 + a multiple of 4"),
        (["--model", "bundled", "--train", "--batch", "3", "--mesh", "fsdp=8"], "--batch 3 must be a multiple of 8"),
        (["--model", "bundled", "--mesh", "data=3"], "does not multiply to the 8 devices; data=8 would"),
        (["--model", "bundled", "--mesh", "rows=8"], "'rows=8' is none of data=N"),
        (["--model", "bundled", "--search", "--mesh", "data=8"], "give no --mesh with it"),
        (["--model", "bundled", "--search", "--train", "--batch", "max"], "--batch max is for --train with one mesh"),
        (["--model", "bundled", "--train", "--window", "9"], "are for generating"),
        (["--model", "bundled", "--window", "10"], "window must be 1 + a multiple of 4"),
        (["--model", "wan2.1-t2v-14b", "--window", "41"], "cannot go on from the frames of another window"),
    ],
)
def test_what_cannot_be_planned_is_one_line(words, message, capsys):
    assert main(["plan", "--topology", "v6e:2x4", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_search_tries_what_divides_and_ranks_by_the_slowest_bound(monkeypatch, capsys):
    tried, (chip, _) = {}, plan.chips("v6e:2x4")

    def needs(job, parts, full):
        sizes = mesh_lib.parse_sizes(job.mesh)
        tried[job.mesh] = parts
        # Seconds of arithmetic and interconnect: 2 and 2 along the batch alone, 3 and hardly any elsewhere.
        seconds = (2, 2) if sizes["context"] == sizes["tensor"] == 1 else (3, 0.1 * sizes["tensor"])
        received = {"all-gather": chip.interconnect * seconds[1]}
        return {parts[0]: plan.Need(hbm=plan.GIB, operations=918e12 * seconds[0], collectives=received)}

    monkeypatch.setattr(plan, "needs", needs)
    job = plan.Job("wan2.1-t2v-1.3b", "", "v6e:2x4", "", (480, 832), 81, batch=8)
    found = list(plan.search(job, ("train",), 1))
    said = capsys.readouterr().err  # as each is found
    assert all(f"mesh {mesh}: fits: 1.00 of 31.2 GiB a chip" in said for mesh in found)
    assert set(tried.values()) == {("train",)} and len(tried) == len(found) > 5
    config = PRESETS[job.model]
    assert set(found) == set(mesh_choice.training_meshes(config, job.size, 8, 8))
    for mesh in found:
        sizes = mesh_lib.parse_sizes(mesh)
        mesh_lib.check_mesh(sizes, 8)
        abstract_params(config, AbstractMesh(tuple(sizes.values()), mesh_lib.AXES))
    # The slowest bound counts, not the sum of them, which only decides between equals.
    assert found[0] == "data=1,fsdp=8,context=1,tensor=1"
    received = [mesh_lib.parse_sizes(mesh)["tensor"] for mesh in found[1:]]
    assert received == sorted(received)
    assert "data=2,context=4,tensor=1" in plan.search(job, plan.parts(job.model), 50)


def test_the_search_puts_a_mesh_on_which_a_part_does_not_fit_last(monkeypatch):
    def needs(job, parts, full):
        sizes = mesh_lib.parse_sizes(job.mesh)
        step = plan.Need(hbm=plan.GIB, operations=918e12 / sizes["context"])
        decode = plan.Need(hbm=(40 if sizes["context"] == 8 else 1) * plan.GIB)
        return dict(zip(parts, (plan.Need(), step, decode), strict=True))

    monkeypatch.setattr(plan, "needs", needs)
    job = plan.Job("wan2.1-t2v-14b", "", "v6e:2x4", "", (720, 1280), 81)
    found = plan.search(job, plan.parts(job.model), 50)
    first, *_, last = found
    job = dataclasses.replace(job, mesh=last)
    assert mesh_lib.parse_sizes(first)["context"] == 4 and mesh_lib.parse_sizes(last)["context"] == 8
    assert plan.verdict(job, found[last], 50).startswith("does not fit in 31.2 GiB: decoding needs 40.0 GiB")


def test_the_search_goes_on_after_a_program_that_could_not_be_made(monkeypatch):
    def needs(job, parts, full):
        if mesh_lib.parse_sizes(job.mesh)["context"] == 8:
            raise RuntimeError("the program of text could not be made")
        return {part: plan.Need(hbm=plan.GIB) for part in parts}

    monkeypatch.setattr(plan, "needs", needs)
    job = plan.Job("wan2.1-t2v-14b", "", "v6e:2x4", "", (720, 1280), 81)
    *others, last = plan.search(job, plan.parts(job.model), 50).values()
    assert others and plan.verdict(job, last, 50) == "does not compile: text"


def test_windows_after_the_first_are_told_of_frames_of_each_video():
    mesh = AbstractMesh((3, 1, 1, 1), mesh_lib.AXES)
    for model, windows, told in (("wan2.2-ti2v-5b", 1, ()), ("wan2.2-ti2v-5b", 2, (3, 3))):
        job = plan.Job(model, "denoise", "v6e:1x3", "data=3", (64, 64), 5, windows=windows)
        given = plan.program(job, mesh)[1][-1]
        assert tuple(len(leaf) for leaf in jax.tree.leaves(given)) == told
    for windows, told in ((1, [1]), (2, [3])):
        job = plan.Job("wan2.2-i2v-a14b", "denoise", "v6e:1x3", "data=3", (64, 64), 5, windows=windows)
        assert [len(leaf) for leaf in jax.tree.leaves(plan.program(job, mesh)[1][-1])] == told


@pytest.mark.parametrize(
    "name,part",
    [("wan2.1-t2v-1.3b", "text"), ("wan2.1-t2v-1.3b", "decode"), ("wan2.2-ti2v-5b", "decode")]
    + [("wan2.1-i2v-14b", "see"), ("wan2.1-flf2v-14b", "see"), ("wan2.2-i2v-a14b", "encode")]
    + [(name, "denoise") for name in PRESETS]
    + [(name, "train") for name, config in PRESETS.items() if not config.dit.condition_channels],
)
def test_every_published_model_has_programs(name, part):
    """They trace, with arguments that are placed."""
    config = PRESETS[name]
    side = config.codec.stride_space * 2
    job = plan.Job(name, part, "v6e:1x1", "data=1", (side, side), 5)
    mesh = mesh_lib.parse_mesh("data=1", devices=jax.devices()[:1])
    function, arguments, donated = plan.program(job, mesh)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(arguments))
    with jax.set_mesh(mesh):
        out = jax.tree.leaves(jax.eval_shape(function, *arguments))
    assert out and donated in ((), 0, 1)


@pytest.mark.parametrize("copies,videos", [(1, 1), (2, 1), (3, 3), (4, 2)])
def test_a_video_is_filled_up_to_what_copies_of_a_model_make(copies, videos):
    """With guidance, whose branches are as good as two videos."""
    mesh = AbstractMesh((copies, 1, 1, 1), mesh_lib.AXES)
    for part, shape in (("denoise", (videos, 2, 4, 4, 16)), ("text", (2 * videos, 512))):
        job = plan.Job("wan2.1-t2v-1.3b", part, f"v6e:1x{copies}", f"data={copies}", (32, 32), 5)
        _, arguments, _ = plan.program(job, mesh)
        assert arguments[1].shape == shape


@pytest.mark.parametrize("side,frames,at_a_time", [(32, 5, 5), (128, 17, 5), (256, 33, 1), (480, 81, 1)])
def test_videos_are_planned_as_many_at_a_time_as_they_are_sampled(side, frames, at_a_time):
    job = plan.Job("wan2.1-t2v-1.3b", "denoise", "v6e:1x1", "data=1", (side, side), frames, batch=5)
    mesh = AbstractMesh((1, 1, 1, 1), mesh_lib.AXES)
    assert len(plan.program(job, mesh)[1][1]) == plan.at_a_time(job) == at_a_time
    need = {"denoise": plan.Need(operations=918e12)}  # one second
    assert plan.at_least(job, need, 7) == pytest.approx(7 * 5 / at_a_time)
    assert (f"batch 5 ({at_a_time} at a time)" in plan.describe(job, need, 7)) == (at_a_time < 5)


def test_a_mesh_that_makes_more_videos_than_are_asked_for_says_so():
    job = plan.Job("wan2.1-t2v-1.3b", "denoise", "v6e:2x4", "fsdp=8", (480, 832), 81)
    words = plan.describe(job, {"denoise": plan.Need(operations=918e12)}, 7)
    assert "batch 1 (4 at a time, as many as the mesh has copies)" in words


def test_small_figures_are_not_zero():
    job = plan.Job("bundled", "denoise", "v6e:2x4", "context=8", (128, 128), 33)
    small = plan.Need(arguments=2**20, heap=2**19, hbm=3 * 2**19, operations=459e9, collectives={"all-gather": 2**21})
    words = plan.describe(job, {"denoise": small}, 10)
    for figure in ("1.00 MiB", "0.50 MiB", "1.50 MiB", "0.46 T", " 0.5 ms", "all-gather 2.00 MiB"):
        assert figure in words, figure
    assert "at most 1.50 MiB of 31.2 GiB a chip; 10 steps take 5 ms at least" in words


@pytest.mark.parametrize("offload", [False, True])
def test_offloaded_training_leaves_tokens_with_the_host(offload):
    job = plan.Job("wan2.1-t2v-1.3b", "train", "v6e:1x1", "data=1", (16, 16), 5, offload=offload)
    mesh = mesh_lib.parse_mesh("data=1", devices=jax.devices()[:1])
    function, arguments, _ = plan.program(job, mesh)
    with jax.set_mesh(mesh):
        traced = str(jax.make_jaxpr(function)(*arguments))
    assert ("<host>" in traced) == offload
    # 30 layers, each given two latent frames of one token, 1,536 bfloat16 numbers.
    said = plan.describe(job, {"train": plan.Need(hbm=2**30)}, 1)
    assert ("GiB of its host" in said) == offload
    assert not offload or plan.for_scripts(job, {"train": plan.Need()}, 1)["with_hosts"] == 30 * 2 * 1536 * 2


def test_training_is_planned_for_what_it_can_be():
    mesh = mesh_lib.parse_mesh("data=1", devices=jax.devices()[:1])
    job = plan.Job("wan2.1-i2v-14b", "train", "v6e:1x1", "data=1", (16, 16), 5)
    with pytest.raises(InputError, match="for transformers that read text alone"):
        plan.program(job, mesh)
    job = dataclasses.replace(job, model="wan2.2-t2v-a14b")
    assert "wan2.2-t2v-a14b, one of its two transformers on v6e:1x1" in plan.describe(job, {"train": plan.Need()}, 1)


def test_what_starts_from_pictures_is_planned_with_what_reads_them():
    assert plan.parts("wan2.1-t2v-1.3b") == ("text", "denoise", "decode")
    assert plan.parts("wan2.2-i2v-a14b") == ("text", "encode", "denoise", "decode")
    assert plan.parts("wan2.1-i2v-14b") == ("text", "see", "encode", "denoise", "decode")


def test_the_verdict_adds_up():
    job = plan.Job("wan2.1-t2v-1.3b", "", "v5e:1x1", "data=1", (480, 832), 81)
    need = plan.Need(arguments=4, heap=4, hbm=8 * plan.GIB, operations=197e12, others=8 * plan.GIB)
    needs = {"text": need, "denoise": need, "decode": need}
    # 8 GiB beside 8 GiB of the others' parameters do not fit in 15.75 GiB.
    assert plan.verdict(job, needs, 10).startswith("does not fit in 15.8 GiB: text needs 16.0 GiB")
    # One after the other they do.
    assert plan.verdict(job, needs, 10).endswith("; with --offload it fits")
    assert "decoding needs 16.0 GiB" in plan.verdict(job, needs, 10) and "\n  decoding " in plan.describe(
        job, needs, 10
    )
    assert plan.verdict(dataclasses.replace(job, offload=True), needs, 10).startswith("fits: at most 8.00 of 15.8 GiB")
    needs = dict.fromkeys(needs, dataclasses.replace(need, hbm=6 * plan.GIB))
    # One second each: the text, 10 steps, 20 latent frames; a quarter of one for the first, which is of one frame.
    assert plan.verdict(job, needs, 10).endswith("the text and 10 steps and decoding take 31.2 s at least")
    # For scripts the same in numbers.
    said = plan.for_scripts(job, needs, 10)
    assert said["fits"] and said["at_least"] == pytest.approx(31.25) and said["chips"] == 1
    assert said["chip"]["hbm"] == 15.75 * plan.GIB
    step = said["parts"]["denoise"]
    assert step["occupied"] == 14 * plan.GIB
    assert step["bounds"] == {"arithmetic": 1.0, "hbm": 0.0, "interconnect": 0.0} and step["at_least"] == 1.0
    json.dumps(said, allow_nan=False)
    needs["decode"] = plan.Need(error="too large")
    said = plan.for_scripts(job, needs, 10)
    assert not said["fits"] and said["at_least"] is None and "bounds" not in said["parts"]["decode"]
    assert plan.verdict(job, needs, 10) == "does not compile: decoding"
    needs["decode"] = plan.Need(error="RESOURCE_EXHAUSTED: 40 of 16 GiB")
    assert plan.verdict(job, needs, 10) == "does not fit: decoding"
    needs["denoise"] = dataclasses.replace(need, moved=819e9, collectives={"all-gather": 300e9})
    rows = plan.describe(dataclasses.replace(job, topology="v5e:4x4"), needs, 10).splitlines()
    assert "does not compile: RESOURCE_EXHAUSTED: 40 of 16 GiB" in "".join(rows)
    # The three bounds of a step, each beside what it is of.
    (step,) = [row for row in rows if "one step" in row]
    assert "197.00 T    1.00 s" in step
    assert "762.75 GiB    1.00 s" in step and "279.40 GiB    1.50 s" in step


def test_windows_are_planned_as_often_as_they_run():
    assert plan.parts("wan2.2-ti2v-5b", windows=3) == ("text", "encode", "denoise", "decode")
    job = plan.Job("wan2.2-ti2v-5b", "", "v6e:1x1", "data=1", (704, 1280), 121, windows=12, overlap=5)
    need = plan.Need(operations=918e12)  # one second
    needs = dict.fromkeys(plan.parts(job.model, job.windows), need)
    # The text, two latent frames encoded for each window after the first, 50 steps and 31 latent frames for each. Of
    # one frame, the first latent frame counts a quarter.
    assert plan.at_least(job, needs, 50) == pytest.approx(1 + 1.25 * 11 + 12 * 50 + 12 * 30.25)
    assert "12 times 50 steps and decoding take 977.8 s" in plan.verdict(job, needs, 50)
    # What has a condition encodes a whole window of it, each time.
    job = dataclasses.replace(job, model="wan2.2-i2v-a14b", frames=81, windows=3)
    needs = dict.fromkeys(plan.parts(job.model, job.windows), need)
    assert plan.at_least(job, needs, 40) == pytest.approx(1 + 3 * 20.25 + 3 * 40 + 3 * 20.25)
    # Of two videos each is sampled by itself, as `generate` does with large ones, and goes on from frames of its own;
    # what sees pictures sees them.
    job = dataclasses.replace(job, model="wan2.1-i2v-14b", batch=2)
    needs = dict.fromkeys(plan.parts(job.model, job.windows), need)
    assert plan.at_least(job, needs, 40) == pytest.approx(2 + 5 + 5 * 20.25 + 2 * 3 * 40 + 2 * 3 * 20.25)


@pytest.mark.parametrize(
    "rest, growth, bend, largest",
    [
        (1.4, 4, 0, 23),
        (1.4, 4, 0.05, 19),
        (1.4, 0.011, 0, 8576),
        (1.4, 0.01, 1e-5, 2611),
        (1.4, 4, -0.01, 25),
        (10, 80, 0, 1),
        (99, 1, 0, 1),
    ],
)
def test_the_largest_batch_that_fits_is_found(monkeypatch, rest, growth, bend, largest):
    """Memory of a known shape: lines, lines that bend, one that fits once, one that never fits (GiB, of 95.74)."""
    asked = []

    def hbm(batch):
        return rest + growth * batch / 16 + bend * (batch / 16) ** 2

    def needs(job, parts, full):
        asked.append(job.batch)
        return {"train": plan.Need(hbm=int(hbm(job.batch) * plan.GIB))}

    monkeypatch.setattr(plan, "needs", needs)
    job, need = plan.largest_batch(plan.Job("bundled", "", "v5p:2x2x4", "fsdp=16", (128, 128), 17))
    # A line is answered at once; else the guess of the line is off by at most its own size, which is halved.
    line = int((95.74 - rest) / growth)
    assert len(asked) <= 4 + 2 * (bend != 0) * line.bit_length() and len(set(asked)) == len(asked)
    assert job.batch == 16 * largest and need.hbm == int(hbm(job.batch) * plan.GIB)


@pytest.mark.parametrize(
    "mesh, most, found",
    [
        ("auto", 40, ("data=1,fsdp=16,context=1,tensor=1", 32)),
        ("auto", 13, ("data=1,fsdp=8,context=2,tensor=1", 8)),
        ("auto", 1, ("data=1,fsdp=1,context=16,tensor=1", 1)),
        ("auto", 0, ("data=1,fsdp=1,context=16,tensor=1", 1)),
        ("fsdp=2,context=8", 13, ("fsdp=2,context=8", 12)),
    ],
)
def test_where_a_clip_is_too_much_for_a_chip_several_share_it(monkeypatch, mesh, most, found):
    """Memory for so many clips among all chips, however they are shared."""
    monkeypatch.setattr(
        plan,
        "needs",
        lambda job, parts, full: {"train": plan.Need(hbm=int(31.25 * plan.GIB * job.batch / max(most, 1e-3)))},
    )
    job, need = plan.largest_batch(plan.Job("wan2.1-t2v-14b", "", "v6e:4x4", mesh, (720, 1280), 81))
    assert (job.mesh, job.batch) == found
    assert plan.fits(job, {"train": need}) == (most > 0)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the TPU compiler is installed")
def test_without_the_compiler_the_extra_is_named(capsys):
    assert main(["plan", "--model", "bundled", "--topology", "v6e:1x1"]) == 2
    assert "pip install -e '.[tpu]'" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: sora-jax[tpu]")
def test_a_program_that_cannot_be_made_is_a_fault_and_no_answer():
    job = plan.Job("bundled", "text", "v6e:1x1", "data=1", (128, 128), 17, dtype="float3")
    with pytest.raises(RuntimeError, match="the program of text could not be made for data=1: .*Error"):
        plan.compile_part(job)
