"""The report on a model: how often videos show what prompts ask for, and how well the codec rebuilds."""

import contextlib
import json
import math
import os
import tempfile
import textwrap
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from sora_jax.codec import Codec
from sora_jax.data.worlds.drawing import HELD_OUT
from sora_jax.data.worlds.render import render
from sora_jax.data.worlds.scenes import sample_scene
from sora_jax.errors import InputError, Refused
from sora_jax.evaluation.prompts import EvaluationPrompt, evaluation_prompts
from sora_jax.evaluation.reader import Reading, read
from sora_jax.generate import Generator
from sora_jax.intervals import wilson
from sora_jax.models import load
from sora_jax.safety.provenance import Claim, together
from sora_jax.video import Video, contact_sheet

# What is asked, as the table calls it, and the aim if there is one.
QUESTIONS = {
    "color": ("colour right", 0.95),
    "shape": ("shape right", 0.90),
    "direction": ("direction of motion right", 0.95),
    "pair": ("two objects, both right", 0.85),
    "placed": ("two objects, both right and placed as asked", None),
    "moving": ("two objects, both right and moving as asked", None),
    "hidden": ("hidden and then back, same colour and shape", 0.90),
    "camera": ("camera motion right", 0.90),
    "color, trained": ("colour right, combination trained on", None),
    "color, unseen": ("colour right, combination never trained on", None),
    "shape, trained": ("shape right, combination trained on", None),
    "shape, unseen": ("shape right, combination never trained on", None),
    "count": ("as many objects as asked for", None),
    "background": ("background right, where one is named", None),
    "fixed camera": ("camera fixed where no motion is asked for", None),
}
PSNR_AIM = 32.0  # dB

_BATCH = 8
_PSNR_CLIPS = 32
_SAMPLES = 12  # one round of the prompts
_METHOD = (
    "Every clip is read from its frames alone: objects by colour, silhouette and track, the camera by the "
    "motion of the background, the background by the usual colour of each row. The reading knows neither prompt "
    "nor scene. Colour, shape and direction are those of the most prominent object. An object counts as hidden "
    "when less than 8 % of it is seen for two frames or more; what hides it is not identified. Two objects are "
    "placed as the mean of their distance says. The ceiling is the same reading of real renders of the same "
    "prompts. In brackets: 95 % Wilson intervals."
)


@dataclass
class _Tally:
    right: int = 0
    n: int = 0

    def result(self) -> dict[str, Any]:
        low, high = wilson(self.right, self.n)
        value = self.right / self.n if self.n else None
        return {"value": value, "low": low, "high": high, "right": self.right, "n": self.n}


def evaluate(
    model: str | os.PathLike | None,
    out: str | os.PathLike,
    count: int = 240,
    seed: int = 0,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    generator: Generator | None = None,
) -> dict[str, Any]:
    """Measures a model and writes report.json, report.md, figures.png, samples.png and samples/*.mp4.

    Args:
        model: a model folder; None is the bundled model.
        out: the folder of the report; made if missing. Its files appear together at the end.
        count: prompts, balanced over what can be asked.
        seed: of prompts, noise and held-out worlds.
        steps, guidance: of the sampler; by default the model's.
        generator: a generator to use in place of the model folder's.

    Returns:
        What report.json holds.

    Raises:
        InputError: if the model cannot be read, the report cannot be written, or matplotlib is missing.
    """
    figure = _figure_class()
    out = Path(out)
    prompts = evaluation_prompts(count, seed)
    generator = generator or load(model)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=out) as hidden:
            sampling = generator.config.sampling
            report = {
                "model": "bundled" if model is None else str(model),
                "seed": seed,
                "steps": sampling.steps if steps is None else steps,
                "guidance": sampling.guidance if guidance is None else guidance,
                "frames": sampling.frames,
                "size": list(sampling.size),
            }
            with tqdm(total=2 * count + _PSNR_CLIPS, desc="evaluating", unit="clip") as bar:
                measured, samples = _measure(generator, prompts, seed, steps, guidance, bar)
                report |= {"rows": measured["rows"], "prompts": measured["prompts"]}
                psnr = codec_psnr(generator, _PSNR_CLIPS, seed, bar)
            report["rows"].append(_psnr_row(psnr))
            _write(Path(hidden), report, samples, figure)
            _publish(Path(hidden), out)
    except OSError as error:
        raise InputError(f"cannot write the report to {out}: {error.strerror or error}") from error
    return report


def score(prompt: EvaluationPrompt, reading: Reading) -> dict[str, bool]:
    """The answers to those of `QUESTIONS` that the prompt asks; False wherever no object was read."""
    objects = reading.objects
    answers = {
        "count": len(objects) == len(prompt.colors),
        "camera" if prompt.camera else "fixed camera": reading.camera == (prompt.camera or "fixed"),
    }
    if prompt.background is not None:
        answers["background"] = reading.background == prompt.background
    if prompt.kind == "pair":
        return answers | _score_pair(prompt, objects)
    first = objects[0] if objects else None
    group = "unseen" if prompt.unseen else "trained"
    for part, (name,) in (("color", prompt.colors), ("shape", prompt.shapes)):
        answers[part] = answers[f"{part}, {group}"] = first is not None and getattr(first, part) == name
    (direction,) = prompt.directions
    if direction is not None:
        answers["direction"] = first is not None and first.direction == direction
    if prompt.hidden:
        answers["hidden"] = first is not None and first.hidden_and_back
    return answers


def _score_pair(prompt, objects):
    """Whether two objects have the colours and shapes that are asked for; and besides, their place, their motions."""
    asked = list(zip(prompt.colors, prompt.shapes, strict=True))
    found = {(seen.color, seen.shape): seen for seen in objects}
    right = len(objects) == 2 and set(found) == set(asked)
    pair = [found[one] for one in asked] if right else []
    answers = {"pair": right}
    if prompt.relation is not None:
        answers["placed"] = right and prompt.relation in _relations(*pair)
    if any(prompt.directions):
        answers["moving"] = right and all(
            wanted in (None, seen.direction) for wanted, seen in zip(prompt.directions, pair, strict=True)
        )
    return answers


def _relations(first, second):
    """Where one object is, seen from another, by the mean of their distance while both are seen."""
    apart_T2 = first.track_T2 - second.track_T2
    apart_T2 = apart_T2[np.isfinite(apart_T2[:, 0])]
    if not len(apart_T2):
        return ()
    x, y = apart_T2.mean(0)
    return ("left of" if x < 0 else "right of", "above" if y < 0 else "below")


def codec_psnr(generator: Generator, clips: int = _PSNR_CLIPS, seed: int = 0, bar: Any = None) -> float:
    """PSNR in dB of the codec on worlds that training never shows, from the squared error over all clips.

    Frames are in [0, 1]: PSNR = -10 log10(mean squared error).
    """
    sampling, codec = generator.config.sampling, Codec(generator.config.codec)
    key = jax.random.fold_in(jax.random.key(HELD_OUT + 1), seed)

    @jax.jit
    def error(params, video_THWC):
        rebuilt_BTHWC = codec.apply({"params": params}, video_THWC[None] * 2 - 1)
        return jnp.mean(((rebuilt_BTHWC[0] + 1) / 2 - video_THWC) ** 2)

    errors = []
    for start in range(0, clips, _BATCH):
        scenes = _sample(jax.random.split(jax.random.fold_in(key, start), _BATCH))
        # One clip at a time: the codec needs far more memory than the frames.
        for video_THWC in _draw(scenes, sampling.frames, tuple(sampling.size))[: clips - start]:
            errors.append(float(error(generator.params["codec"], video_THWC)))
            if bar is not None:
                bar.update()
    return -10 * math.log10(max(np.mean(errors), 1e-10))


_sample = jax.jit(jax.vmap(sample_scene))


@partial(jax.jit, static_argnums=(1, 2))
def _draw(scenes, frames, size):
    """Real renders, float [B, T, H, W, 3] in [0, 1]; always of `_BATCH` scenes, to compile once."""
    return jax.vmap(lambda scene: render(scene, frames, size)[0])(scenes)


def _measure(generator, prompts, seed, steps, guidance, bar):
    """Tables and per-prompt answers, and the first generated clips with what was read in them."""
    sampling = generator.config.sampling
    tallies = {source: {q: _Tally() for q in QUESTIONS} for source in ("generated", "ceiling")}
    entries, samples = [], []
    for start in range(0, len(prompts), _BATCH):
        batch = prompts[start : start + _BATCH]
        generated = generator.generate(
            [prompt.text for prompt in batch],
            seed=[(seed + start + i) % 2**32 for i in range(len(batch))],
            steps=steps,
            guidance=guidance,
            progress=False,
        )
        filled = [batch[min(i, len(batch) - 1)].scene for i in range(_BATCH)]
        scenes = jax.tree.map(lambda *leaves: np.stack(leaves), *filled)
        real = _draw(scenes, sampling.frames, tuple(sampling.size))
        real_BTHWC = np.round(np.asarray(real)[: len(batch)] * 255).astype(np.uint8)
        for prompt, video, frames in zip(batch, generated, real_BTHWC, strict=True):
            readings = {"generated": read(video.frames), "ceiling": read(frames)}
            answers = {source: score(prompt, reading) for source, reading in readings.items()}
            for source in answers:
                for question, right in answers[source].items():
                    tallies[source][question].right += right
                    tallies[source][question].n += 1
            entries.append(
                {
                    "prompt": prompt.text,
                    "kind": prompt.kind,
                    "unseen": prompt.unseen,
                    "read": {source: _in_words(reading) for source, reading in readings.items()},
                    "right": answers,
                }
            )
            if len(samples) < _SAMPLES:
                samples.append((prompt, video, _in_words(readings["generated"])))
            bar.update(2)
    rows = [
        {
            "question": question,
            "label": label,
            "unit": "",
            "aim": aim,
            **{source: tallies[source][question].result() for source in tallies},
        }
        for question, (label, aim) in QUESTIONS.items()
    ]
    return {"rows": rows, "prompts": entries}, samples


def _in_words(reading):
    objects = [
        f"{seen.color} {seen.shape} {seen.direction}{' hidden and back' * seen.hidden_and_back}"
        for seen in reading.objects
    ]
    return f"{' and '.join(objects) or 'nothing'}, camera {reading.camera}, background {reading.background}"


def _psnr_row(psnr):
    return {
        "question": "codec",
        "label": "codec reconstruction, held-out worlds",
        "unit": "dB PSNR",
        "aim": PSNR_AIM,
        "generated": {"value": psnr, "low": None, "high": None, "right": None, "n": _PSNR_CLIPS},
        "ceiling": None,
    }


def _write(folder, report, samples, figure):
    # What the frame scan withholds is missing, with its reasons in place of it: the figures stand without it.
    (folder / "samples").mkdir()
    shown = []
    for number, sample in enumerate(samples, 1):
        prompt, video, _ = sample
        with contextlib.suppress(Refused):
            video.save(folder / "samples" / f"{number:02d}-{prompt.kind}.mp4")
            shown.append(sample)
    with contextlib.suppress(Refused):
        if shown:
            claim = together([video.claim or Claim() for _, video, _ in shown])
            picture = Video(_pixels(_draw_samples(shown, figure)), claim=claim)
            picture.save(folder / "samples.png")
    _draw_rows(report["rows"], figure).savefig(folder / "figures.png")
    pictures = [name for name in ("figures.png", "samples.png") if (folder / name).exists()]
    (folder / "report.md").write_text(_markdown(report, pictures), encoding="utf-8")
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")


def _publish(hidden, out):
    """Moves finished files to their names, report.json last: where it is new, everything is."""
    (out / "samples").mkdir(exist_ok=True)
    for path in out.glob("samples/[0-9][0-9]-*"):  # of a report before
        path.unlink()
    for path in sorted(hidden.glob("samples/*")):
        os.replace(path, out / "samples" / path.name)
    for name in ("samples.png", "samples.png.withheld.json", "figures.png", "report.md", "report.json"):
        if (hidden / name).exists():
            os.replace(hidden / name, out / name)
        else:
            (out / name).unlink(missing_ok=True)  # of a report before


def _markdown(report, pictures):
    height, width = report["size"]
    lines = [
        f"# Evaluation: {report['model']}",
        "",
        f"{len(report['prompts'])} prompts, seed {report['seed']}, {report['steps']} steps, guidance "
        f"{report['guidance']:g}, {report['frames']} frames of {height}x{width}.",
        "",
        "| | generated | real renders (ceiling) | aim | n |",
        "|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        aim = "" if row["aim"] is None else f"{row['aim']:g} {row['unit']}".strip()
        cells = [_cell(row["generated"], row["unit"]), _cell(row["ceiling"], row["unit"])]
        lines.append(f"| {row['label']} | {cells[0]} | {cells[1]} | {aim} | {row['generated']['n']} |")
    shown = [line for name in pictures for line in ("", f"![]({name})")]
    limits = limits_of_reading(report)
    return "\n".join([*lines, *(["", limits] if limits else []), "", _METHOD, *shown, ""])


def limits_of_reading(report: dict[str, Any]) -> str:
    """What this report cannot show, since real renders themselves are not read well enough; empty if there is none."""
    low = [
        f"{row['label']} ({row['ceiling']['value']:.3f})"
        for row in report["rows"]
        if row["aim"] and row["ceiling"] and row["ceiling"]["n"] and row["ceiling"]["value"] < row["aim"]
    ]
    if not low:
        return ""
    height, width = report["size"]
    return (
        f"At {report['frames']} frames of {height}x{width} real renders are read right less often than is aimed at, so "
        f"that the figures tell little of the model: {'; '.join(low)}."
    )


def _cell(result, unit):
    if result is None or result["value"] is None:
        return ""
    if result["low"] is None:
        return f"{result['value']:.1f} {unit}"
    return f"{result['value']:.3f} ({result['low']:.3f} to {result['high']:.3f})"


def _figure_class():
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the report needs matplotlib: in the clone, pip install -e '.[evaluate]'") from error
    return partial(Figure, dpi=100, layout="constrained")


def _pixels(page):
    """What is drawn on a page, uint8 [1, H, W, 3]: pictures of generated frames leave the way videos do."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(page)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[None, ..., :3].copy()


def _draw_rows(rows, figure):
    shown = [row for row in rows if row["aim"] is not None]
    shares = [row for row in shown if row["ceiling"] and row["generated"]["n"]]
    page = figure(figsize=(10, 5.5))
    left, right = page.subplots(1, 2, width_ratios=(6, 1))
    y = np.arange(len(shares))
    for source, label, color, offset in (
        ("generated", "generated", "tab:blue", -0.2),
        ("ceiling", "real renders (ceiling)", "lightgray", 0.2),
    ):
        results = [row[source] for row in shares]
        value = np.array([result["value"] for result in results])
        bars = [value - [r["low"] for r in results], [r["high"] for r in results] - value]
        left.barh(y + offset, value, 0.38, color=color, label=label)
        left.errorbar(value, y + offset, xerr=np.maximum(bars, 0), fmt="none", ecolor="black", capsize=3)
    left.vlines([row["aim"] for row in shares], y - 0.42, y + 0.42, "tab:red", linewidth=2, label="aim")
    left.set_yticks(y, [f"{row['label']}\n(n = {row['generated']['n']})" for row in shares])
    left.invert_yaxis()
    left.set(xlim=(0, 1.02), xlabel="share of prompts, with 95 % intervals")
    page.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    psnr = shown[-1]
    right.bar(["codec"], [psnr["generated"]["value"]], color="tab:blue")
    right.axhline(psnr["aim"], color="tab:red", linewidth=2)
    right.set(ylabel="PSNR on held-out worlds (dB)")
    return page


def _draw_samples(samples, figure):
    """Rows of frames with the prompt beside them, and below it what was read."""
    scale = max(1, 128 // samples[0][1].frames.shape[1])
    sheet = contact_sheet([Video(video.frames, video.fps) for _, video, _ in samples])
    sheet = sheet.repeat(scale, 0).repeat(scale, 1)
    height, width = sheet.shape[:2]
    margin = 330
    page = figure(figsize=((width + margin) / 100, height / 100), layout="none")
    axes = page.add_axes((margin / (width + margin), 0, width / (width + margin), 1))
    axes.imshow(sheet, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    for row, (prompt, _, words) in enumerate(samples):
        top = 1 - (row + 0.06) / len(samples)
        prompt_lines, read_lines = (textwrap.fill(t, 44) for t in (prompt.text, f"read: {words}"))
        page.text(0.01, top, prompt_lines, fontsize=9, va="top", parse_math=False)
        page.text(
            0.01,
            top - 0.82 / len(samples),
            read_lines,
            fontsize=8,
            va="bottom",
            color="gray",
            parse_math=False,
        )
    return page
