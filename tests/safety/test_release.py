import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
from files import write

from sora_jax import media
from sora_jax.errors import InputError, Refused
from sora_jax.safety import keys, mark, provenance, release, scan
from sora_jax.safety.provenance import Claim
from sora_jax.video import Video, read_video


class FakeScanner:
    """Finds what it is told to."""

    name = "fake"
    scans_for = scan.KINDS[:1]

    def __init__(self, score=0.0):
        self.score = score

    def scores(self, frames_THWC):
        return np.full(len(frames_THWC), self.score, np.float32)


def noisy_clip(T=5, side=64):
    t, y, x = np.meshgrid(np.arange(T), *[np.arange(side)] * 2, indexing="ij")
    smooth = 128 + 60 * np.sin(x / 9 + t / 3) + 30 * np.cos(y / 7)
    rough = smooth[..., None] * [1.0, 0.9, 0.8] + np.random.default_rng(0).normal(0, 4, (T, side, side, 1))
    claim = Claim(origin="model", model="tiny", seed=3, prompt="a red ball")
    return Video(np.clip(rough, 0, 255).astype(np.uint8), 8.0, claim)


def save(video, path, score=0.0, **how):
    """Saves with a scanner in place of the package's own, which takes noise for something else."""
    with mock.patch.object(scan, "default_scanner", lambda: FakeScanner(score)):
        return video.save(path, **how)


@pytest.mark.parametrize("name", ["a red ball.mp4", "a-red-ball.gif", "a red ball.png"])
def test_every_file_is_signed_and_says_how_it_was_made(tmp_path, name):
    video = noisy_clip(1 if name.endswith("png") else 5)
    path = save(video, tmp_path / name)
    assert os.listdir(tmp_path) == [name]
    manifest = provenance.read_manifest(path, keys.local_anchor())
    assert manifest.state == "trusted" and "trainedAlgorithmicMedia" in manifest.source_types
    said = manifest.generation
    assert (manifest.title, said["model"], said["seed"]) == (f"video{path.suffix}", "tiny", 3)
    assert [one["scanner"] for one in said["checks"]["frames"]] == ["fake"]
    assert said["checks"]["mark"] == f"{release.mark_of(video.claim, video.frames):04x}"
    assert b"a red ball" not in path.read_bytes() and b"a-red-ball" not in path.read_bytes()
    assert b"a red ball" in save(video, path, embed_prompt=True).read_bytes()


def test_a_file_without_a_known_origin_is_signed_too(tmp_path):
    path = save(Video(noisy_clip().frames), tmp_path / "clip.mp4")
    manifest = provenance.read_manifest(path, keys.local_anchor())
    assert (manifest.state, manifest.problems) == ("trusted", ())
    assert manifest.actions == ("c2pa.created", "c2pa.unknown", "c2pa.watermarked.unbound")
    assert manifest.source_types == ("empty",)


def test_what_was_read_from_a_file_is_a_copy_of_it(tmp_path):
    """A video by others that is saved again does not pass for one that was made or edited here, nor by a model."""
    theirs = write(tmp_path / "theirs.mp4", noisy_clip().frames, 8.0)
    manifest = provenance.read_manifest(save(read_video(theirs), tmp_path / "again.gif"), keys.local_anchor())
    assert manifest.actions == ("c2pa.opened", "c2pa.transcoded", "c2pa.watermarked.unbound")
    assert manifest.source_types == () and manifest.generation["origin"] == "file"
    assert [(one.title, one.relationship, one.state) for one in manifest.ingredients] == [
        ("video.mp4", "parentOf", "none")
    ]


def test_what_was_changed_since_it_was_read_is_no_copy(tmp_path):
    video = read_video(write(tmp_path / "theirs.mp4", noisy_clip().frames, 8.0))
    for change in ({"frames": 255 - video.frames}, {"frames": video.frames[1:]}, {"fps": 9.0}):
        path = save(dataclasses.replace(video, **change), tmp_path / "again.mp4")
        manifest = provenance.read_manifest(path, keys.local_anchor())
        assert manifest.actions == ("c2pa.opened", "c2pa.unknown", "c2pa.watermarked.unbound")
        assert manifest.generation["origin"] == ""


def test_a_scanner_of_ones_own_looks_beside_the_packages(tmp_path):
    own = FakeScanner(0.0)
    with pytest.raises(Refused):
        save(noisy_clip(), tmp_path / "clip.mp4", score=0.99, scanner=own)
    with pytest.raises(Refused):
        save(noisy_clip(), tmp_path / "clip.mp4", scanner=FakeScanner(0.99))
    path = save(noisy_clip(), tmp_path / "clip.mp4", scanner=own)
    scans = provenance.read_manifest(path).generation["checks"]["frames"]
    assert [one["scanner"] for one in scans] == ["fake", "fake"]


def test_what_is_written_is_marked_and_looks_the_same(tmp_path):
    video = noisy_clip(9, 128)
    frames = read_video(save(video, tmp_path / "clip.mp4")).frames
    found = mark.detect(frames, keys.watermark_key())
    assert found.found and found.payload == release.mark_of(video.claim, video.frames)
    assert not mark.detect(video.frames, keys.watermark_key()).found, "raw frames stay raw"
    assert 10 * np.log10(255**2 / np.mean((frames.astype(float) - video.frames) ** 2)) > 33


def test_the_same_video_has_the_same_frames_whoever_saves_it(tmp_path):
    files = [save(noisy_clip(), tmp_path / name) for name in ("a.mp4", "b.mp4")]
    assert np.array_equal(*[read_video(file).frames for file in files])
    frames = noisy_clip().frames
    assert release.mark_of(Claim(seed=1), frames) != release.mark_of(Claim(seed=2), frames)
    assert release.mark_of(Claim(seed=1), frames) == release.mark_of(Claim(seed=1), frames[1:])


def test_videos_of_unknown_origin_have_marks_of_their_own(tmp_path):
    frames = noisy_clip().frames
    clips = (frames, frames[:, ::-1], frames[:4], 255 - frames, frames.reshape(5, 128, 32, 3))
    marks = [release.mark_of(Claim(), clip) for clip in clips]
    assert len({*marks}) == len(marks) and marks[0] == release.mark_of(Claim(), frames.copy())


def test_a_hit_withholds_the_file_and_leaves_a_report(tmp_path):
    target = tmp_path / "clip.mp4"
    target.write_bytes(b"older")
    with pytest.raises(Refused, match="withholds .*clip.mp4; .*clip.mp4.withheld.json says why"):
        save(noisy_clip(), target, score=0.99)
    assert target.read_bytes() == b"older"
    report = (tmp_path / "clip.mp4.withheld.json").read_text()
    assert '"passed": false' in report and len(report) < 2000
    assert sorted(os.listdir(tmp_path)) == ["clip.mp4", "clip.mp4.withheld.json"]


def test_the_report_may_have_a_name_of_its_own(tmp_path):
    with pytest.raises(Refused, match="withholds a video; .*why.json says why"):
        save(noisy_clip(), tmp_path / "clip.mp4", score=0.99, report=str(tmp_path / "why.json"))
    assert os.listdir(tmp_path) == ["why.json"]


@pytest.mark.parametrize("hard_links", [True, False])
def test_who_saves_at_the_same_time_under_one_name_loses_nothing(tmp_path, monkeypatch, hard_links):
    """Both are encoded and signed before either has its name; some file systems have no hard links."""
    videos = [noisy_clip(), noisy_clip(1)]
    ready, verify = threading.Barrier(len(videos)), provenance.verify_signed
    monkeypatch.setattr(scan, "default_scanner", FakeScanner)
    monkeypatch.setattr(provenance, "verify_signed", lambda *given: (verify(*given), ready.wait(60)))
    if not hard_links:
        no_links = OSError(errno.EPERM, "Operation not permitted")
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(no_links))
    (tmp_path / "clip.gif").write_bytes(b"older")
    signer = keys.load_signer()
    with ThreadPoolExecutor() as threads:
        saving = [threads.submit(one.save, tmp_path / "clip.gif", signer=signer, replace=False) for one in videos]
        paths = [one.result() for one in saving]
    assert sorted(os.listdir(tmp_path)) == ["clip-2.gif", "clip-3.gif", "clip.gif"] and len({*paths}) == 2
    assert (tmp_path / "clip.gif").read_bytes() == b"older"
    assert [len(read_video(path).frames) for path in paths] == [5, 1]
    assert all(provenance.read_manifest(path, keys.local_anchor()).state == "trusted" for path in paths)


STAGES = [
    (release.scan, "scan"),
    (mark, "embed"),
    (media, "encode"),
    (provenance, "sign"),
    (provenance, "verify_signed"),
    (media, "count"),
    (os, "replace"),
    (os, "link"),  # in place of the last one, where a file takes the first free name
]


@pytest.mark.parametrize("module, name", STAGES[:-1], ids=[name for _, name in STAGES[:-1]])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_whatever_fails_leaves_the_older_file_and_nothing_else(tmp_path, monkeypatch, module, name, failure):
    target = tmp_path / "clip.mp4"
    target.write_bytes(b"older")
    monkeypatch.setattr(module, name, lambda *_: (_ for _ in ()).throw(failure))
    with pytest.raises((InputError, OSError, KeyboardInterrupt)):
        save(noisy_clip(), target)
    assert os.listdir(tmp_path) == ["clip.mp4"] and target.read_bytes() == b"older"


def test_a_signature_that_does_not_verify_is_not_kept(tmp_path, monkeypatch):
    sign = provenance.sign

    def damage(*arguments):
        return sign(*arguments)[:-3] + b"xyz"

    monkeypatch.setattr(provenance, "sign", damage)
    with pytest.raises(InputError, match="does not verify"):
        save(noisy_clip(), tmp_path / "clip.mp4")
    assert not os.listdir(tmp_path)


def test_killed_without_hard_links_no_empty_file_has_the_name(tmp_path):
    script = f"""
import os, sys, time
sys.path[:0] = {sys.path!r}
from pathlib import Path
from sora_jax import media
def no_link(*_): raise OSError(1, "Operation not permitted")
os.link, os.replace = no_link, lambda *_: (print("here", flush=True), time.sleep(60))
media.take_free_name(Path("hidden.mp4"), Path("clip.mp4"))
"""
    (tmp_path / "hidden.mp4").write_bytes(b"signed")
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"here\n"
        process.kill()
    assert not (tmp_path / "clip.mp4").exists() and (tmp_path / "hidden.mp4").read_bytes() == b"signed"


def test_that_a_model_made_frames_is_said_of_those_it_made_alone(tmp_path):
    made = noisy_clip()
    claim = Claim(origin="model", model="tiny", seed=3, frames_sha256=provenance.frames_digest(made.frames))
    turned, reshaped = made.frames[:, ::-1], made.frames.reshape(len(made.frames), -1, 2 * made.frames.shape[2], 3)
    for frames, said in ((made.frames, True), (turned, False), (reshaped, False)):
        path = save(Video(np.ascontiguousarray(frames), claim=claim), tmp_path / "clip.mp4")
        manifest = provenance.read_manifest(path, keys.local_anchor())
        assert (manifest.generation["seed"] == 3) == said == ("tiny" in json.dumps(manifest.generation))
        assert any("rainedAlgorithmicMedia" in kind for kind in manifest.source_types) == said


def test_a_file_has_the_speed_that_it_says_and_a_mark_that_it_tells_of(tmp_path):
    made = noisy_clip()
    digest = provenance.frames_digest(made.frames)
    claim = Claim(origin="model", config={"fps": 8.0, "steps": 3}, frames_sha256=digest)
    path = save(Video(made.frames, 24.0, claim), tmp_path / "clip.mp4")
    manifest = provenance.read_manifest(path, keys.local_anchor())
    assert manifest.generation["config"] == {"fps": 24.0, "steps": 3}
    assert manifest.actions == ("c2pa.created", "c2pa.watermarked.unbound")


@pytest.mark.parametrize("stage", ["scan", "sign", "verify_signed", "replace", "link"])
def test_killed_before_the_end_the_older_file_is_what_it_was(tmp_path, stage):
    """Killed outright, with the new file encoded, signed, or read back, but not in its place: none is unsigned."""
    script = f"""
import sys, time
sys.path[:0] = {sys.path!r}
from test_release import STAGES, noisy_clip, save
(module,) = [module for module, name in STAGES if name == {stage!r}]
setattr(module, {stage!r}, lambda *_: (print("here", flush=True), time.sleep(60)))
save(noisy_clip(), "clip.mp4", replace={stage != "link"})
"""
    target = tmp_path / "clip.mp4"
    target.write_bytes(b"older")
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert target.read_bytes() == b"older"
    others = [path for path in tmp_path.iterdir() if path != target]
    assert len(others) == (stage in ("verify_signed", "replace", "link"))
    assert all(provenance.read_manifest(path, keys.local_anchor()).state == "trusted" for path in others)
