"""How a step of the sampler grows with tokens and shrinks with chips: `python experiments/scaling_report.py`.

Writes a table (docs/scaling.md) and its plot beside it, from the TPU compiler's reports: needs `sora-jax[tpu]` for that
compiler, matplotlib for the plot, and no TPU. Each row takes half a minute on two quiet cores.
"""

import argparse
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from sora_jax import plan
from sora_jax.mesh import parse_sizes
from sora_jax.mesh_choice import generating_mesh

TOKENS_MODEL, TOKENS_TOPOLOGY = "wan2.1-t2v-1.3b", "v6e:2x4"
# frames and size, of 2**10 to 2**20 tokens
TOKENS = ((1, (512, 512)), (1, (1024, 1024)), (13, (1024, 1024)), (61, (1024, 1024)), (253, (1024, 1024)))
TOKENS += ((1021, (1024, 1024)),)
CHIPS_MODEL, FRAMES, SIZE = "wan2.1-t2v-14b", 81, (720, 1280)
CHIPS = ("v6e:1x1", "v6e:2x2", "v6e:4x4", "v6e:8x8", "v6e:16x16")
HEAD = """# How a step grows with tokens and shrinks with chips

Written by `python experiments/scaling_report.py`, from the TPU compiler's own memory report and the collectives in
the compiled program (libtpu {version}); no TPU was used, and nothing here is a measurement of time. One step of the
sampler with guidance, bfloat16; its two branches are one batch on several chips, and one after the other on a single
one. Memory and traffic are per chip. "At best" is what has to come in by attention with all-to-all alone (where the
heads do not divide, rings carry keys and values besides, which this leaves out), with tensor > 1 by three sums a block,
all of it in bfloat16, and by every weight that rests elsewhere, once. With data=2 each half of the chips has one branch
of guidance. The last column is the time that arithmetic takes at the chip's peak, over the largest of arithmetic,
weights from HBM and traffic: 100 % means that nothing but arithmetic bounds the step.

![](scaling.png)

"""
COLUMNS = ("tokens", "chips", "mesh", "arguments", "heap", "TFLOP", "received", "at best", "arithmetic")


def least_traffic(job: plan.Job, tokens: int) -> float:
    """Bytes that a chip has to receive in a step (bfloat16): activations, and the weights that rest elsewhere."""
    dit, sizes = plan.model_config(job.model).dit, parse_sizes(job.mesh)
    context, tensor, width = sizes["context"], sizes["tensor"], dit.heads * dit.head_width
    weights = dit.layers * (8 * width**2 + 2 * width * dit.feed_forward) * 2 / tensor
    own = dit.layers * (2 / sizes["data"]) * (tokens / context) * width * 2  # tokens of a chip; guidance has two
    # Queries, keys and values go to the chips of their heads, and the result comes back: four times.
    exchanged = 4 * own / tensor * (context - 1) / context
    # Two attentions and the feed-forward end in sums over the chips that split their columns: scattered and gathered.
    summed = 3 * own * 2 * (tensor - 1) / tensor
    return weights * (context - 1) / context + exchanged + summed


def measure(model: str, topology: str, frames: int, size: tuple[int, int]) -> dict:
    config = plan.model_config(model)
    chip, chips = plan.chips(topology)
    tokens = config.tokens(frames, size)
    mesh, _ = generating_mesh(config, size, chips)
    job = plan.Job(model, "denoise", topology, mesh, size, frames)
    need = plan.compile_part(job)
    bounds = need.bounds(chip)
    return dict(
        tokens=tokens,
        chips=chips,
        mesh=",".join(word for word in mesh.split(",") if not word.endswith("=1")) or "-",
        error=need.error,
        arguments=need.arguments / plan.GIB,
        heap=need.heap / plan.GIB,
        operations=need.operations / 1e12,
        received=sum(need.collectives.values()) / plan.GIB,
        least=least_traffic(job, tokens) / plan.GIB,
        arithmetic=0.0 if need.error else bounds["arithmetic"] / max(bounds.values()),
    )


def table(title: str, rows: list[dict]) -> str:
    lines = [title, "", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        cells = [f"{row['tokens']:,}", str(row["chips"]), row["mesh"]]
        if row["error"]:
            cells += [row["error"], *[""] * 5]
        else:
            cells += [f"{row['arguments']:.2f} GiB", f"{row['heap']:.2f} GiB", f"{row['operations']:.1f}"]
            least = f"{row['least']:.2f} GiB" if row["least"] else ""
            cells += [f"{row['received']:.2f} GiB", least, f"{row['arithmetic']:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n"


def draw(by_tokens: list[dict], by_chips: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, rows, axis in zip(figure.subplots(1, 2), (by_tokens, by_chips), ("tokens", "chips"), strict=True):
        rows = [row for row in rows if not row["error"]]
        for name, label in (("operations", "TFLOP"), ("heap", "heap, GiB"), ("received", "received, GiB")):
            points = [(row[axis], row[name]) for row in rows if row[name] > 0]
            axes.loglog(*zip(*points, strict=True), "o-", label=f"{label} a chip and step")
        least = [(row[axis], row["least"]) for row in rows if row["least"] > 0]
        if least:
            axes.loglog(*zip(*least, strict=True), "k:", label="received, at best")
        axes.set_xlabel(axis)
        axes.grid(alpha=0.3)
    figure.axes[0].set_title(f"{TOKENS_MODEL} on {TOKENS_TOPOLOGY}", fontsize=10)
    figure.axes[1].set_title(f"{CHIPS_MODEL}, {FRAMES} frames of {SIZE[0]} x {SIZE[1]}, on v6e", fontsize=10)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/scaling.md"))
    output = parser.parse_args().output
    if find_spec("libtpu") is None:
        parser.error(plan.NEEDS_LIBTPU)
    by_tokens, by_chips = [], []
    jobs = [(by_tokens, TOKENS_MODEL, TOKENS_TOPOLOGY, *clip) for clip in TOKENS]
    jobs += [(by_chips, CHIPS_MODEL, topology, FRAMES, SIZE) for topology in CHIPS]
    for rows, *job in jobs:
        rows.append(measure(*job))
        print(rows[-1], flush=True)
        # After each row: a long run may be cut short.
        text = HEAD.format(version=version("libtpu"))
        text += table(f"Tokens: {TOKENS_MODEL} on {TOKENS_TOPOLOGY}.", by_tokens)
        text += table(f"Chips: {CHIPS_MODEL}, {FRAMES} frames of {SIZE[0]} x {SIZE[1]}.", by_chips)
        output.write_text(text.rstrip() + "\n")
    draw(by_tokens, by_chips, output.with_name("scaling.png"))


if __name__ == "__main__":
    main()
