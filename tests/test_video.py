import errno
import os

import av
import numpy as np
import pytest

from sora_jax import media
from sora_jax.errors import InputError
from sora_jax.media import check_output
from sora_jax.video import Video, contact_sheet, read_video


def smooth_clip(T=9, H=64, W=96):
    t, y, x = np.meshgrid(*(np.linspace(0, 1, n) for n in (T, H, W)), indexing="ij")
    rgb = np.stack([0.5 + 0.4 * np.sin(3 * x + 2 * t), 0.5 + 0.4 * np.cos(3 * y - t), 0.2 + 0.5 * x * y], -1)
    return Video((255 * rgb).astype(np.uint8), 8)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def test_mp4_plays_in_a_browser(tmp_path):
    clip = smooth_clip()
    path = clip.save(tmp_path / "clip.mp4")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.frames, stream.average_rate, context.width, context.height) == (9, 8, 96, 64)
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (
            1,
            1,
            1,
            1,
        )
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "the index must come first for playback while loading"
    back = read_video(path)
    assert back.fps == 8
    assert psnr(back.frames, clip.frames) > 35


@pytest.mark.parametrize("rate", [1, 7.5, 23.976, 60])
def test_speed_survives(tmp_path, rate):
    path = Video(smooth_clip().frames, rate).save(tmp_path / "clip.mp4")
    assert read_video(path).fps == pytest.approx(rate, rel=1e-3)


def test_odd_sides_grow_by_one(tmp_path):
    clip = Video(smooth_clip(5, 33, 47).frames)
    back = read_video(clip.save(tmp_path / "odd.mp4")).frames
    assert back.shape == (5, 34, 48, 3)
    assert psnr(back[:, :33, :47], clip.frames) > 35


def test_gif_has_all_frames_and_the_colours_of_the_clip(tmp_path):
    clip = smooth_clip()
    back = read_video(clip.save(tmp_path / "clip.gif"))
    assert back.frames.shape == clip.frames.shape
    assert psnr(back.frames, clip.frames) > 20
    few = np.zeros((4, 32, 32, 3), np.uint8)
    few[..., 0] = 200
    few[2:, 8:16, 8:16] = (20, 40, 220)
    back = read_video(Video(few).save(tmp_path / "few.gif")).frames
    assert np.abs(back.astype(int) - few).max() <= 4


def test_png_is_exact_and_for_one_frame(tmp_path):
    one = Video(smooth_clip().frames[:1])
    assert np.array_equal(read_video(one.save(tmp_path / "one.png")).frames, one.frames)
    with pytest.raises(InputError, match="holds one frame, not 9"):
        smooth_clip().save(tmp_path / "many.png")


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


def test_impossible_places_are_named(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("")
    for name, reason in {
        "x.avi": "must end in",
        "x": "must end in",
        "none/x.mp4": "no folder",
        "folder.mp4": "is a folder",
        "file/x.mp4": "no folder",
    }.items():
        with pytest.raises(InputError, match=reason):
            check_output(tmp_path / name, 9)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"):
        check_output(tmp_path / "x.mp4", 9)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_older_file_and_nothing_else(tmp_path, monkeypatch, suffix, failure):
    target = tmp_path / f"clip{suffix}"
    target.write_bytes(b"older")

    def fail_half_way(path, frames, rate):
        path.write_bytes(b"half")
        raise failure

    monkeypatch.setitem(media._ENCODERS, suffix, fail_half_way)
    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else InputError
    with pytest.raises(expected) as caught:
        smooth_clip().save(target)
    if expected is InputError:
        assert "No space left on device" in str(caught.value)
    assert os.listdir(tmp_path) == [target.name] and target.read_bytes() == b"older"


def test_a_file_that_lost_frames_is_not_kept(tmp_path, monkeypatch):
    write = media._ENCODERS[".mp4"]
    monkeypatch.setitem(media._ENCODERS, ".mp4", lambda path, frames, rate: write(path, frames[:-2], rate))
    with pytest.raises(InputError, match="only 7 of 9 frames"):
        smooth_clip().save(tmp_path / "clip.mp4")
    assert not os.listdir(tmp_path)


def test_reading_what_is_no_video(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    for name in ("text.mp4", "none.mp4", "."):
        with pytest.raises(InputError, match="cannot read"):
            read_video(tmp_path / name)


def test_names_are_paths_and_not_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip = smooth_clip(3)
    for name in ("file:a%03d.mp4", "two: one.gif"):
        assert len(read_video(clip.save(name)).frames) == 3
    assert sorted(os.listdir(tmp_path)) == ["file:a%03d.mp4", "two: one.gif"]


def test_notebook_form():
    assert smooth_clip()._repr_html_().startswith("<video")
    assert Video(smooth_clip().frames[:1])._repr_html_().startswith("<img")


def test_contact_sheet_takes_first_and_last_frame():
    clips = [smooth_clip(), Video(255 - smooth_clip().frames)]
    sheet = contact_sheet(clips, columns=3, gap=2)
    assert sheet.dtype == np.uint8 and sheet.shape == (2 * 66 + 2, 3 * 98 + 2, 3)
    assert np.array_equal(sheet[2:66, 2:98], clips[0].frames[0])
    assert np.array_equal(sheet[68:132, -98:-2], clips[1].frames[-1])
    with pytest.raises(InputError):
        contact_sheet([])
