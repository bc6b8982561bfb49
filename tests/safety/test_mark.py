import io

import av
import jax
import numpy as np
import pytest
from files import write

from sora_jax import media
from sora_jax.errors import InputError
from sora_jax.safety import mark

KEY = bytes(range(32))


def clip(T=9, H=128, W=128, noise=3.0):
    """Something that moves on something with a little texture."""
    t, y, x = np.meshgrid(np.arange(T), np.arange(H), np.arange(W), indexing="ij")
    background = 120 + 40 * np.sin(x / 23) + 25 * np.cos(y / 17)
    ball = (x - 20 - 6 * t) ** 2 + (y - H / 2) ** 2 < (H / 6) ** 2
    luma = np.where(ball, 200, background)[..., None] * [1.0, 0.9, 0.8]
    luma = luma + np.random.default_rng(0).normal(0, noise, (H, W, 1))
    return np.clip(luma, 0, 255).astype(np.uint8)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def encoded(frames, codec, crf):
    file, options = io.BytesIO(), {"crf": str(crf)} | ({"b:v": "0"} if codec == "libvpx-vp9" else {})
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream(codec, rate=8, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def resized(frames, side):
    small = jax.image.resize(frames.astype(np.float32), (len(frames), side, side, 3), "linear")
    return np.clip(np.round(small), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def marked():
    return mark.embed(clip(), 0xBEEF, KEY)


def test_it_is_faint_and_the_same_each_time(marked):
    assert marked.dtype == np.uint8 and marked.shape == clip().shape
    for before, after in zip(clip(), marked, strict=True):
        assert 40 < psnr(before, after) < 42
    assert np.array_equal(marked, mark.embed(clip(), 0xBEEF, KEY))


CHANGES = {
    "none": lambda frames: frames,
    "H.264 CRF 28": lambda frames: encoded(frames, "libx264", 28),
    "VP9": lambda frames: encoded(frames, "libvpx-vp9", 33),
    "half the size": lambda frames: resized(frames, 64),
    "two thirds of the size": lambda frames: resized(frames, 85),
    "a crop": lambda frames: frames[:, 11 : 11 + 112, 5 : 5 + 112],
    "a crop, H.264": lambda frames: encoded(frames[:, 3 : 3 + 112, 13 : 13 + 112], "libx264", 23),
    "another frame rate": lambda frames: frames[[0, 0, 1, 3, 4, 6, 6, 8]],
    "one frame": lambda frames: frames[4:5],
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_survives(marked, change):
    found = mark.detect(CHANGES[change](marked), KEY)
    assert found.found and found.payload == 0xBEEF
    assert found.scale == {"half the size": 0.5, "two thirds of the size": 2 / 3}.get(change, 1.0)


def test_it_survives_the_file_of_the_package(marked, tmp_path):
    write(tmp_path / "clip.mp4", marked, 8)
    found = mark.detect(media.read(tmp_path / "clip.mp4")[0], KEY)
    assert found.payload == 0xBEEF and found == mark.detect(media.some(tmp_path / "clip.mp4", 96), KEY)


def test_another_key_finds_nothing_and_neither_do_unmarked_frames(marked):
    assert mark.detect(marked, bytes(32)) == mark.Detection(False, None, 0.0, mark.detect(marked, bytes(32)).scale)
    assert not mark.detect(clip(), KEY).found


def test_the_bound_on_chance_holds():
    """Agreement of frames with random phases is as rare as said: the tail of the sum, at levels that can be counted."""
    rng = np.random.default_rng(0)
    weight_N = rng.uniform(0.1, 1, 60)
    sums = (weight_N * np.cos(rng.uniform(0, 2 * np.pi, (200_000, 60)))).sum(1)
    for quantile in (0.9, 0.99, 0.9999):
        level = np.quantile(sums, quantile)
        bound = 10 ** mark._log10_chance(level, weight_N)
        assert 1 - quantile <= bound < 12 * (1 - quantile)


def test_the_bound_on_chance_holds_for_a_clip_under_many_keys():
    """Any one payload at any one shift agrees with an unmarked clip as rarely as said, or more rarely."""
    seen_N, weight_N = mark._heard(mark._measured(clip())[0])
    sums = []
    for number in range(12):
        words = np.exp(-1j * mark._phases(bytes([number] * 32)))
        high, low = ((words[half] @ np.asarray(seen_N)[half::2]).real for half in range(2))
        sums.append(np.add.outer(high, low))
    for quantile in (0.9, 0.99, 0.999):
        bound = 10 ** mark._log10_chance(np.quantile(sums, quantile), weight_N)
        assert 1 - quantile <= bound < 15 * (1 - quantile)


def test_unmarked_frames_under_many_keys_stay_below_the_bound():
    """The best agreement over all payloads and shifts, as `detect` takes it, never comes near what counts as found."""
    chances = [
        mark.detect(clip(3, 64, 64, noise), bytes([number] * 32)) for number in range(12) for noise in (0.0, 20.0)
    ]
    assert not any(found.found for found in chances)
    assert min(found.log10_chance for found in chances) > -2


@pytest.mark.parametrize("payload", [0, 1, 0xFF00, 0xFFFF])
def test_all_sixteen_bits(payload):
    assert mark.detect(mark.embed(clip(3), payload, KEY), KEY).payload == payload


@pytest.mark.parametrize("shape", [(1, 32, 32), (2, 33, 47), (1, 9, 200), (3, 16, 16)])
def test_any_size_takes_it(shape):
    frames = clip(*shape)
    marked = mark.embed(frames, 7, KEY)
    assert marked.shape == frames.shape and psnr(frames, marked) > 39.5
    found = mark.detect(marked, KEY)
    assert found.payload in (None, 7)


def test_a_page_with_white_margins():
    """Large, flat in most places, busy in others."""
    page = np.full((1, 700, 500, 3), 255, np.uint8)
    page[:, 100:400, 200:450] = np.random.default_rng(0).integers(0, 256, (1, 300, 250, 1))
    marked = mark.embed(page, 7, KEY)
    assert psnr(page, marked) > 40 and mark.detect(marked, KEY).payload == 7


@pytest.mark.parametrize("level", [0, 128, 255])
def test_flat_frames(level):
    frames = np.full((3, 128, 128, 3), level, np.uint8)
    found = mark.detect(mark.embed(frames, 7, KEY), KEY)
    assert found.payload == 7
    assert not mark.detect(frames, KEY).found


def test_a_long_clip_takes_no_more_memory_of_the_device(monkeypatch):
    """It holds a frame at a time, and programs that are compiled once for all lengths."""
    frames, held, compiled = clip(3, 64, 96), [], []

    def watched(function):
        def call(frame_HWC, *others):
            out = function(frame_HWC, *others)
            held.append(sum(array.nbytes for array in jax.live_arrays()))
            compiled.append(function._cache_size())
            return out

        return call

    for name in ("_measure", "_add"):
        monkeypatch.setattr(mark, name, watched(getattr(mark, name)))
    mark.detect(mark.embed(frames, 7, KEY), KEY)
    most, programs = max(held), max(compiled)
    held.clear()
    mark.detect(mark.embed(np.tile(frames, (20, 1, 1, 1)), 7, KEY), KEY)
    assert len(held) == 3 * 60 and max(held) <= most + frames[0].nbytes and max(compiled) == programs


def test_the_payload_has_sixteen_bits():
    with pytest.raises(InputError, match="0 to 65535, not 65536"):
        mark.embed(clip(1), 65536, KEY)
