import errno
import os
from pathlib import Path

import numpy as np
import pytest
from test_media import smooth_clip

from sora_jax import media
from sora_jax.errors import InputError, Refused
from sora_jax.safety import release
from sora_jax.video import Video, contact_sheet, read_video


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)]
)
def test_frames_are_validated(frames):
    with pytest.raises(InputError, match="uint8 frames"):
        Video(frames)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_speed_is_validated(fps):
    with pytest.raises(InputError, match="fps"):
        Video(np.zeros((1, 8, 8, 3), np.uint8), fps)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_older_file_and_nothing_else(tmp_path, monkeypatch, suffix, failure):
    target = tmp_path / f"clip{suffix}"
    target.write_bytes(b"older")

    def fail_half_way(path, data):
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        raise failure

    monkeypatch.setattr(Path, "write_bytes", fail_half_way)
    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else InputError
    with pytest.raises(expected) as caught:
        Video(smooth_clip()).save(target)
    if expected is InputError:
        assert "No space left on device" in str(caught.value)
    assert os.listdir(tmp_path) == [target.name] and target.read_bytes() == b"older"


def test_a_file_that_lost_frames_is_not_kept(tmp_path, monkeypatch):
    encode = media._ENCODERS[".mp4"]
    monkeypatch.setitem(media._ENCODERS, ".mp4", lambda frames, rate: encode(frames[:-2], rate))
    with pytest.raises(InputError, match="only 7 of 9 frames"):
        Video(smooth_clip()).save(tmp_path / "clip.mp4")
    assert not os.listdir(tmp_path)


def test_a_saved_video_is_read_back(tmp_path):
    video = Video(smooth_clip(), 12)
    back = read_video(video.save(tmp_path / "clip.mp4"))
    assert back.fps == 12 and back.frames.shape == video.frames.shape
    assert np.abs(back.frames.astype(int) - video.frames).mean() < 4


def test_printed_form_is_short():
    assert repr(Video(np.zeros((5, 64, 96, 3), np.uint8), fps=12.5)) == "Video(5 frames of 64x96, fps=12.5)"


def test_notebook_form():
    assert Video(smooth_clip())._repr_html_().startswith("<video")
    assert Video(smooth_clip()[:1])._repr_html_().startswith("<img")


def test_what_a_notebook_may_not_show_names_no_report_that_is_gone(monkeypatch):
    def withhold(*_):
        raise Refused("the frame scan withholds /tmp/x/video.mp4; /tmp/x/video.mp4.withheld.json says why")

    monkeypatch.setattr(release, "release", withhold)
    with pytest.raises(Refused, match="withholds the video; saved to a file, it leaves a report"):
        Video(smooth_clip())._repr_html_()


def test_contact_sheet_takes_first_and_last_frame():
    clips = [Video(smooth_clip()), Video(255 - smooth_clip())]
    sheet = contact_sheet(clips, columns=3, gap=2)
    assert sheet.dtype == np.uint8 and sheet.shape == (2 * 66 + 2, 3 * 98 + 2, 3)
    assert np.array_equal(sheet[2:66, 2:98], clips[0].frames[0])
    assert np.array_equal(sheet[68:132, -98:-2], clips[1].frames[-1])
    with pytest.raises(InputError):
        contact_sheet([])
