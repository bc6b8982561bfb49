"""The report: its numbers, its files, and that it is there completely or not at all."""

import dataclasses
import hashlib
import json
import sys

import jax
import numpy as np
import pytest

import sora_jax
from sora_jax.errors import InputError
from sora_jax.evaluation import report as report_module
from sora_jax.evaluation.prompts import evaluation_prompts
from sora_jax.evaluation.reader import Reading, SeenObject
from sora_jax.evaluation.report import QUESTIONS, codec_psnr, evaluate, score
from sora_jax.generate import Generator
from sora_jax.intervals import wilson
from sora_jax.model_config import SamplingConfig
from sora_jax.safety import scan
from sora_jax.safety.manifest import read_manifest
from sora_jax.safety.provenance import Claim
from sora_jax.video import Video, read_video

COUNT = 13  # more than a batch, and not a multiple of it


class FakeGenerator(Generator):
    """Answers each prompt with the render of its scene, after `change`."""

    def __init__(self, config, params, change=lambda frames: frames):
        sampling = SamplingConfig(steps=2, frames=9, size=(64, 64))
        super().__init__(dataclasses.replace(config, sampling=sampling, vocabulary=()), params)
        self.scenes = {prompt.text: prompt.scene for prompt in evaluation_prompts(COUNT)}
        self.change = change
        self.calls = []

    def generate(self, prompts, *, seed, **options):
        self.calls.append((prompts, seed, options))
        filled = [self.scenes[prompts[min(i, len(prompts) - 1)]] for i in range(8)]
        clips = report_module._draw(jax.tree.map(lambda *a: np.stack(a), *filled), 9, (64, 64))
        frames = np.round(np.asarray(clips) * 255).astype(np.uint8)
        digests = [hashlib.sha256(prompt.encode()).hexdigest() for prompt in prompts]
        made = {"origin": "model", "model": "fake", "weights_sha256": "0f" * 32}
        claims = [
            Claim(config={"steps": 2, "odd": one % 2}, seed=one, prompt_sha256=digest, **made)
            for one, digest in zip(seed, digests, strict=True)
        ]
        return [Video(self.change(clip), 8.0, claim) for clip, claim in zip(frames, claims, strict=False)]


@pytest.fixture(scope="module")
def fake(tiny_config, tiny_params):
    return FakeGenerator(tiny_config, tiny_params)


@pytest.fixture(scope="module")
def perfect(fake, tmp_path_factory):
    """The folder and the result of evaluating a generator that makes no mistake."""
    out = tmp_path_factory.mktemp("reports") / "new" / "report"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_module, "codec_psnr", lambda *_: 30.0)
        result = evaluate(None, out, COUNT, steps=3, guidance=2.0, generator=fake)
    return out, result


def rows(result):
    return {row["question"]: row for row in result["rows"]}


def test_a_perfect_generator_reaches_the_ceiling(perfect, fake):
    _, result = perfect
    for question in QUESTIONS:
        row = rows(result)[question]
        assert row["generated"] == row["ceiling"], question
    assert rows(result)["color"]["generated"]["n"] == sum(p.kind != "pair" for p in evaluation_prompts(COUNT))
    texts = [text for prompts, _, _ in fake.calls for text in prompts]
    seeds = [seed for _, seeds, _ in fake.calls for seed in seeds]
    assert texts == [prompt.text for prompt in evaluation_prompts(COUNT)] and seeds == list(range(COUNT))
    assert all(options["steps"] == 3 and options["guidance"] == 2.0 for _, _, options in fake.calls)


def test_the_files_are_complete(perfect):
    out, result = perfect
    assert json.loads((out / "report.json").read_text()) == result
    names = {path.name for path in out.iterdir()}
    assert names == {"report.json", "report.md", "figures.png", "samples.png", "samples"}
    for picture in ("figures.png", "samples.png"):
        assert read_video(out / picture).frames.std() > 5
    videos = sorted((out / "samples").iterdir())
    assert len(videos) == 12 and len(read_video(videos[0]).frames) == 9
    table = (out / "report.md").read_text()
    for row in result["rows"]:
        assert row["label"] in table
    assert "32 dB PSNR" in table and "13 prompts, seed 0, 3 steps, guidance 2" in table
    assert len(result["prompts"]) == COUNT


def test_what_cannot_be_read_off_real_renders_is_said(perfect):
    """Nine frames of 64x64 are too few for some questions: the table alone would blame the model."""
    out, result = perfect
    low = [row for row in result["rows"] if row["aim"] and row["ceiling"] and row["ceiling"]["value"] < row["aim"]]
    said = report_module.limits_of_reading(result)
    assert low and all(f"{row['label']} ({row['ceiling']['value']:.3f})" in said for row in low)
    assert said.count("; ") == len(low) - 1 and "At 9 frames of 64x64" in said
    assert said in (out / "report.md").read_text()
    read = [row | {"ceiling": row["ceiling"] and {"value": 1.0, "n": 5}} for row in result["rows"]]
    unasked = [row | {"ceiling": row["ceiling"] and {"value": None, "n": 0}} for row in result["rows"]]
    for rows in (read, unasked):
        assert report_module.limits_of_reading({**result, "rows": rows}) == ""


def test_the_picture_of_the_samples_says_how_they_were_made(perfect):
    manifest = read_manifest(perfect[0] / "samples.png")
    assert manifest.source_types == ("trainedAlgorithmicMedia",)
    said = manifest.generation
    assert (said["model"], said["weights_sha256"], said["version"]) == ("fake", "0f" * 32, sora_jax.__version__)
    prompts = [prompt.text for prompt in evaluation_prompts(COUNT)][:12]
    digests = [hashlib.sha256(prompt.encode()).hexdigest() for prompt in prompts]
    assert said["config"] == {"steps": 2, "prompts_sha256": digests, "seeds": list(range(12))}
    assert not any(prompt.encode() in (perfect[0] / "samples.png").read_bytes() for prompt in prompts)


def test_a_sample_that_is_withheld_costs_the_picture_alone(tiny_config, tiny_params, tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "codec_psnr", lambda *_: 30.0)

    class Suspicious:
        """Takes everything for what must not leave."""

        name, scans_for = "suspicious", scan.KINDS[:1]

        def scores(self, frames_THWC):
            return [1.0] * len(frames_THWC)

    monkeypatch.setattr(scan, "default_scanner", Suspicious)
    (tmp_path / "samples.png").write_bytes(b"of a report before")
    evaluate(None, tmp_path, COUNT, generator=FakeGenerator(tiny_config, tiny_params, lambda frames: frames))
    assert not (tmp_path / "samples.png").exists() and (tmp_path / "figures.png").exists()
    assert "samples.png" not in (tmp_path / "report.md").read_text() and (tmp_path / "report.json").exists()
    assert {path.suffixes[-2] for path in (tmp_path / "samples").iterdir()} == {".withheld"}


def test_wrong_colors_cost_the_color_alone(tiny_config, tiny_params, tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "codec_psnr", lambda *_: 30.0)
    swapped = FakeGenerator(tiny_config, tiny_params, lambda frames: frames[..., [1, 2, 0]])
    answers = rows(evaluate(None, tmp_path, COUNT, generator=swapped))
    assert answers["color"]["generated"]["value"] < 0.3 < 0.9 < answers["color"]["ceiling"]["value"]
    assert answers["direction"]["generated"]["right"] == answers["direction"]["ceiling"]["right"]


def test_a_model_folder_is_evaluated(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "_PSNR_CLIPS", 2)
    (tmp_path / "notes.txt").write_text("kept")
    with pytest.warns(UserWarning, match="does not know"):
        result = evaluate(tiny_folder, tmp_path, 3)
    assert 0 < rows(result)["codec"]["generated"]["value"] < 30  # its parameters are random
    assert result["model"] == str(tiny_folder) and result["size"] == [32, 64]
    assert (tmp_path / "report.json").is_file() and (tmp_path / "notes.txt").read_text() == "kept"
    # Nothing was asked of a kind that does not occur.
    assert rows(result)["camera"]["generated"]["value"] is None


def test_an_interrupted_run_leaves_nothing_behind(fake, tmp_path, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(report_module, "codec_psnr", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate(None, tmp_path, 2, generator=fake)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_told_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the report"):
        evaluate(None, tmp_path / "file", 1, generator=object())
    with pytest.raises(InputError, match="no model folder"):
        evaluate(tmp_path / "nowhere", tmp_path / "report", 1)
    assert not (tmp_path / "report").exists()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[evaluate\]'"):
        evaluate(None, tmp_path, 1)


def test_psnr_is_that_of_the_mean_squared_error(fake, monkeypatch):
    class Off:
        def __init__(self, config):
            pass

        def apply(self, variables, video_BTHWC):
            return video_BTHWC + 0.2  # 0.1 in frames from 0 to 1

    monkeypatch.setattr(report_module, "Codec", Off)
    assert codec_psnr(fake, 2) == pytest.approx(20, abs=1e-3)


def test_scores_of_made_up_readings():
    prompts = {prompt.kind: prompt for prompt in evaluation_prompts(COUNT)}

    def seen(color, shape, direction="still", back=False):
        return SeenObject(color, shape, direction, back, np.zeros((1, 2)), np.ones(1))

    def read(*objects, background="other"):
        return Reading(objects, "fixed", background)

    wall = prompts["wall"]
    right = score(wall, read(seen(*wall.colors, *wall.shapes, wall.directions[0], True), background=wall.background))
    assert all(right.values()) and {"color", "shape", "direction", "hidden"} <= set(right)
    nothing = score(wall, read())
    assert not any(nothing[question] for question in ("color", "shape", "direction", "hidden", "count"))

    differ = (one for one in evaluation_prompts(60) if len({*one.colors}) == len({*one.shapes}) == 2)
    pair = next(differ)
    both = [seen(*names) for names in zip(pair.colors, pair.shapes, strict=True)]
    assert score(pair, read(both[1], both[0]))["pair"]
    assert not score(pair, read(both[0]))["pair"]
    assert not score(pair, read(*both, both[0]))["pair"]
    crossed = [seen(*names) for names in zip(pair.colors, pair.shapes[::-1], strict=True)]
    assert not score(pair, read(*crossed))["pair"]
    assert not score(prompts["camera"], read())["camera"]

    named = next(prompt for prompt in evaluation_prompts(COUNT) if prompt.background)
    assert score(named, read(background=named.background))["background"]
    assert not score(named, read())["background"]


def test_scores_of_where_two_objects_are_and_go():
    pair = next(prompt for prompt in evaluation_prompts(COUNT) if prompt.kind == "pair")
    names = list(zip(pair.colors, pair.shapes, strict=True))

    def read(*directions, apart):
        places = [np.array([[0.5, 0.5], [np.nan, np.nan]]), np.array([[0.5, 0.5], [0.5, 0.5]]) + apart]
        objects = [
            SeenObject(*name, direction, False, place, np.ones(2))
            for name, direction, place in zip(names, directions, places, strict=True)
        ]
        return Reading((objects[1], objects[0]), "fixed", "other")

    def answers(reading, relation, *directions):
        right = score(dataclasses.replace(pair, relation=relation, directions=directions), reading)
        return {part: right[part] for part in ("pair", "placed", "moving") if part in right}

    reading = read("left", "still", apart=(0.3, -0.1))
    assert answers(reading, "left of", "left", "still") == {"pair": True, "placed": True, "moving": True}
    assert answers(reading, "below", "left", None) == {"pair": True, "placed": True, "moving": True}
    assert answers(reading, "above", "still", "left") == {"pair": True, "placed": False, "moving": False}
    assert answers(reading, "right of", None, None) == {"pair": True, "placed": False}
    assert answers(reading, None, None, "still") == {"pair": True, "moving": True}
    other = dataclasses.replace(reading, objects=reading.objects[:1])
    assert answers(other, "left of", None, "still") == {"pair": False, "placed": False, "moving": False}


def test_wilson_intervals():
    assert wilson(8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert wilson(10, 10)[1] == pytest.approx(1) and wilson(0, 10)[0] == pytest.approx(0)
    assert wilson(0, 0) == (0, 1)
