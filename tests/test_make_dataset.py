"""Own videos become a data set that training reads."""

from fractions import Fraction

import av
import numpy as np
import pytest
from scripts import script

from sora_jax import media
from sora_jax.data import clips

OPTIONS = ["--frames", "5", "--size", "32", "--fps", "8"]


def write(path, levels, fps, rows=48, columns=64):
    """A video whose frames are gray: so bright in the middle, black at both sides; and its captions."""
    frames = np.zeros((len(levels), rows, columns, 3), np.uint8)
    side = (columns - rows) // 2
    frames[:, :, side : columns - side] = np.array(levels, np.uint8)[:, None, None, None]
    path.write_bytes(media.encode(frames, fps, ".mp4"))
    path.with_suffix(".txt").write_text("a gray square\n\n  gray \n")


@pytest.fixture(scope="module")
def make_dataset():
    return script("experiments/make_dataset.py")


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    (folder / "more").mkdir(parents=True)
    write(folder / "a.mp4", range(0, 240, 20), 8)  # 12 frames: two clips, two frames are left
    write(folder / "more" / "fast.mp4", range(0, 240, 10), 16)
    write(folder / "slow.mp4", range(0, 160, 40), 4)
    write(folder / "z.mp4", [50] * 3, 8)
    return folder


def test_videos_are_cut_into_clips_at_one_speed(make_dataset, videos, tmp_path, capsys):
    assert make_dataset.main([str(videos), str(tmp_path / "data"), *OPTIONS]) == 0
    said = capsys.readouterr()
    folder = tmp_path / "data" / "clips" / "1.0.0"
    assert said.out.splitlines()[-1] == f"{folder}: 3 in train, 2 in held_out"
    assert f"note: {videos / 'z.mp4'} is shorter than 5 frames at 8 a second" in said.err
    found = {}
    for split in ("train", "held_out"):
        stored = clips.stored_as(folder, split, 5, 32)
        assert {stored[i]["captions"].decode() for i in range(len(stored))} == {"a gray square\ngray"}
        videos_NTHWC = [stored[i]["video"].astype(float) for i in range(len(stored))]
        assert all(np.ptp(video_THWC, axis=(1, 2, 3)).max() < 25 for video_THWC in videos_NTHWC)  # the square alone
        found[split] = sorted(video_THWC.mean((1, 2, 3)).round(-1).tolist() for video_THWC in videos_NTHWC)
    assert found["held_out"] == [[0, 20, 40, 60, 80], [100, 120, 140, 160, 180]]
    assert found["train"] == [[0, 0, 40, 40, 80], [0, 20, 40, 60, 80], [100, 120, 140, 160, 180]]
    assert make_dataset.main([str(videos), str(tmp_path / "data"), *OPTIONS]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_video_that_was_cut_out_of_a_longer_one_begins_where_it_begins(make_dataset, tmp_path):
    path = tmp_path / "late.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(6):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 40 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = 80 + number, Fraction(1, 8)  # from the tenth second on
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    levels = [frame.mean().round(-1) for frame in make_dataset.frames_of(path, 32, 8)]
    assert levels == [0, 40, 80, 120, 160, 200]


def test_what_an_editor_writes_before_the_first_caption_is_no_part_of_it(make_dataset, videos):
    (videos / "a.txt").write_text("a gray square\n", encoding="utf-8-sig")
    assert make_dataset.videos_in(videos)[videos / "a.mp4"] == "a gray square"


@pytest.mark.parametrize("what", ["nowhere", "alone", "uncaptioned", "empty", "damaged", "playlist", "short"])
def test_videos_that_make_no_data_set_are_one_line(make_dataset, videos, tmp_path, capsys, what):
    messages = {
        "nowhere": "is no folder",
        "alone": "has 1 videos; training and what is held out need one each at least",
        "uncaptioned": "slow.mp4: cannot read its captions",
        "empty": "slow.txt has no caption",
        "damaged": "cannot read",
        "playlist": "cannot read",
        "short": "none of 3 videos has 49 frames at 8 a second",
    }
    folder, options = videos, OPTIONS
    if what == "nowhere":
        folder = tmp_path / "nowhere"
    elif what == "alone":
        folder = videos / "more"
    elif what == "uncaptioned":
        (videos / "slow.txt").unlink()
    elif what == "empty":
        (videos / "slow.txt").write_text("\n")
    elif what == "damaged":
        (videos / "slow.mp4").write_bytes((videos / "slow.mp4").read_bytes()[:400])
    elif what == "playlist":  # which would have other files read
        (videos / "slow.mp4").write_text("ffconcat version 1.0\nfile 'a.mp4'\n")
    else:
        options = [*OPTIONS[2:], "--frames", "49"]
    assert make_dataset.main([str(folder), str(tmp_path / "data"), *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and lines[0].startswith("make_dataset: error: ") and messages[what] in lines[0]
    assert not (tmp_path / "data" / "clips" / "1.0.0").exists()
