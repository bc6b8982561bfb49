import contextlib
import os
import socket
import struct
import subprocess
import sys
import time
from fractions import Fraction

import av
import numpy as np
import pytest
from files import write

from sora_jax import media
from sora_jax.errors import InputError


def smooth_clip(T=9, H=64, W=96):
    t, y, x = np.meshgrid(*(np.linspace(0, 1, n) for n in (T, H, W)), indexing="ij")
    rgb = np.stack([0.5 + 0.4 * np.sin(3 * x + 2 * t), 0.5 + 0.4 * np.cos(3 * y - t), 0.2 + 0.5 * x * y], -1)
    return (255 * rgb).astype(np.uint8)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def test_mp4_plays_in_a_browser(tmp_path):
    clip = smooth_clip()
    path = write(tmp_path / "clip.mp4", clip, 8)
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
    back, fps = media.read(path)
    assert fps == 8
    assert psnr(back, clip) > 35


@pytest.mark.parametrize("rate", [1, 7.5, 23.976, 60])
def test_speed_survives(tmp_path, rate):
    path = write(tmp_path / "clip.mp4", smooth_clip(), rate)
    assert media.read(path)[1] == pytest.approx(rate, rel=1e-3)


def test_odd_sides_grow_by_one(tmp_path):
    clip = smooth_clip(5, 33, 47)
    back, _ = media.read(write(tmp_path / "odd.mp4", clip, 8))
    assert back.shape == (5, 34, 48, 3)
    assert psnr(back[:, :33, :47], clip) > 35


def test_gif_has_all_frames_and_the_colours_of_the_clip(tmp_path):
    clip = smooth_clip()
    back, _ = media.read(write(tmp_path / "clip.gif", clip, 8))
    assert back.shape == clip.shape
    assert psnr(back, clip) > 20
    few = np.zeros((4, 32, 32, 3), np.uint8)
    few[..., 0] = 200
    few[2:, 8:16, 8:16] = (20, 40, 220)
    back, _ = media.read(write(tmp_path / "few.gif", few, 8))
    assert np.abs(back.astype(int) - few).max() <= 4


def test_png_is_exact_and_for_one_frame(tmp_path):
    one = smooth_clip()[:1]
    assert np.array_equal(media.read(write(tmp_path / "one.png", one, 8))[0], one)
    with pytest.raises(InputError, match="holds one frame, not 9"):
        media.check_output(tmp_path / "many.png", 9, 8)


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
            media.check_output(tmp_path / name, 9, 8)


def test_a_gif_counts_in_hundredths_of_a_second(tmp_path):
    media.check_output(tmp_path / "x.gif", 9, 100)
    for fps in (101, 0.001):
        with pytest.raises(InputError, match="use .mp4"):
            media.check_output(tmp_path / "x.gif", 9, fps)
    path = write(tmp_path / "fast.gif", smooth_clip(9), 100)
    assert len(media.read(path)[0]) == 9


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"):
        media.check_output(tmp_path / "x.mp4", 9, 8)


def test_reading_what_is_no_video(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    for name in ("text.mp4", "none.mp4", "."):
        with pytest.raises(InputError, match="cannot read"):
            media.read(tmp_path / name)


def test_names_in_a_file_that_are_not_utf_8_are_no_matter(tmp_path):
    path = write(tmp_path / "clip.mp4", smooth_clip(3), 8)
    path.write_bytes(path.read_bytes().replace(b"mp41", b"mp4\xb7"))
    assert len(media.read(path)[0]) == 3


def test_video_that_nothing_here_decodes_is_one_line(tmp_path):
    path = write(tmp_path / "clip.mp4", smooth_clip(3), 8)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"xxxx"))
    with pytest.raises(InputError, match="its video is in no known encoding"):
        media.read(path)


def test_a_text_reads_neither_other_files_nor_the_network(tmp_path):
    """FFmpeg knows playlists by their content; what they point to is not what was given."""
    write(tmp_path / "other.png", smooth_clip(1), 8)
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/x.ts"
        server.settimeout(0.5)
        for name, text in {
            "playlist.m3u8": f"#EXTM3U\n#EXTINF:1,\n{address}\n#EXT-X-ENDLIST\n",
            "session.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
            "list.mp4": "ffconcat version 1.0\nfile other.png\n",
        }.items():
            (tmp_path / name).write_text(text)
            started = time.monotonic()
            with pytest.raises(InputError, match="cannot read"):
                media.read(tmp_path / name)
            assert time.monotonic() - started < 2
        with contextlib.suppress(TimeoutError):
            asked.append(server.accept())
    assert not asked


def test_of_a_long_file_some_frames_are_kept(tmp_path):
    path = write(tmp_path / "long.mp4", smooth_clip(21), 8)
    all_frames, _ = media.read(path)
    assert media.count(path) == 21
    for most, step in ((21, 1), (20, 2), (11, 2), (8, 4), (1, 32)):
        assert np.array_equal([*media.some(path, most)], all_frames[::step])
    with pytest.raises(InputError, match="long.mp4 is a video; a picture is one frame"):
        media.decode_picture(path.read_bytes(), path)
    assert np.array_equal(media.decode(path.read_bytes(), path)[0], all_frames)


def test_frames_that_no_memory_holds_are_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "one.png", smooth_clip(1), 8)
    monkeypatch.setattr(media, "_MOST_PIXELS", 10)
    with pytest.raises(InputError, match="pixels are too many"):
        media.read(path)


@pytest.mark.parametrize(
    "orientation, turns, mirror",
    [(1, 0, 1), (2, 0, -1), (3, 2, 1), (4, 2, -1), (5, 1, -1), (6, -1, 1), (7, -1, -1), (8, 1, 1)],
)
def test_pictures_are_read_as_they_were_held(orientation, turns, mirror):
    """Exif 2.32, tag 0x0112: how the camera was turned when the picture was taken, and whether it saw a mirror."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16, :32], pixels[16:, 32:] = (250, 0, 0), (0, 0, 250)
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = 32, 64, "yuvj444p", Fraction(1)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuvj444p")
    jpeg = b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode()])
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHHI", 0x0112, 3, 1, orientation, 0, 0)
    held = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]
    (found,) = media.decode(held, "held.jpg")[0]
    (plain,) = media.decode(jpeg, "plain.jpg")[0]
    assert np.array_equal(found, np.rot90(plain[:, ::mirror], turns))


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_the_same_frames_give_the_same_file_whatever_memory_held_before(tmp_path, suffix):
    """`MALLOC_PERTURB_` fills fresh memory: an encoder that reads what it never wrote gives another file each time."""
    script = f"""
import sys, numpy as np
sys.path[:0] = [{os.path.dirname(__file__)!r}]
from files import write
t, y, x = np.meshgrid(np.arange(5), *[np.arange(64)] * 2, indexing="ij")
frames = 128 + 60 * np.sin(x / 9 + t / 3) + 30 * np.cos(y / 7) + np.random.default_rng(0).normal(0, 4, x.shape)
write(sys.argv[1], np.repeat(frames.astype(np.uint8)[: 1 if ".png" in sys.argv[1] else 5, ..., None], 3, -1), 8)
"""
    files = [tmp_path / f"{fill}{suffix}" for fill in (0, 1, 85)]
    for file in files:
        subprocess.run(
            [sys.executable, "-c", script, file], env={**os.environ, "MALLOC_PERTURB_": file.stem}, check=True
        )
    assert len({file.read_bytes() for file in files}) == 1


def test_a_small_file_that_unfolds_to_very_many_pixels_is_read_in_part(tmp_path, monkeypatch):
    """A GIF of large frames that each change one pixel."""
    screen = b"GIF89a" + (512).to_bytes(2, "little") * 2 + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    one_pixel = b"!\xf9\x04\x04\x0a\0\0\0" + b",\0\0\0\0\x01\0\x01\0\0" + b"\x02\x02D\x01\0"
    (tmp_path / "bomb.gif").write_bytes(screen + 400 * one_pixel + b";")
    monkeypatch.setattr(media, "_MOST_DECODED", 2**22)
    monkeypatch.setattr(media, "_MOST_TO_A_BYTE", 2**8)
    frames = [*media.some(tmp_path / "bomb.gif", 96)]
    assert frames[0].shape == (512, 512, 3) and len(frames) == 17
    assert len(media.read(tmp_path / "bomb.gif")[0]) == 400  # who asks for all of them has them
