"""How well the invisible mark survives what happens to videos, as a table in Markdown.

    python experiments/mark_robustness.py                                   # clips of the bundled model
    python experiments/mark_robustness.py --clips a.mp4 b.mp4 --side 256    # windows cut out of other videos
    python experiments/mark_robustness.py --frames 1                        # pictures

Each clip is marked with a key and payload of its own, changed, and read. A mark counts as recovered if all 16 bits are
right. The last rows are unmarked clips under random keys: no mark may be found, and the least probable agreement shows
how far from it they stay (`MOST_CHANCE` is what counts as found).
"""

from __future__ import annotations

import argparse
import io
import math
import time
from collections.abc import Callable

import av
import jax
import numpy as np

from sora_jax import media
from sora_jax.errors import InputError
from sora_jax.safety import mark

PROMPTS = (
    "a red ball rolls behind a gray wall",
    "a large blue cube slides to the right",
    "a small white star falls down at night",
    "a gray truck drives past a green pyramid",
    "the camera pans right past a yellow star",
    "a pink ball to the left of a blue cube",
    "a tiny purple ball bounces over the snow",
    "an orange pyramid moves up on a plain gray background",
)


def encoded(frames_THWC: np.ndarray, codec: str, crf: int) -> np.ndarray:
    """After a video codec, with 4:2:0 colour; odd sides lose a row or column."""
    H, W = (side // 2 * 2 for side in frames_THWC.shape[1:3])
    file, options = io.BytesIO(), {"crf": str(crf)} | ({"b:v": "0"} if codec == "libvpx-vp9" else {})
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream(codec, rate=8, options=options)
        stream.height, stream.width, stream.pix_fmt = H, W, "yuv420p"
        for frame in frames_THWC[:, :H, :W]:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def resized(frames_THWC: np.ndarray, height: int, width: int, method: str = "cubic") -> np.ndarray:
    out = jax.image.resize(frames_THWC.astype(np.float32), (len(frames_THWC), height, width, 3), method)
    return np.clip(np.round(out), 0, 255).astype(np.uint8)


def cropped(frames_THWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Twelve per cent less on each side, anywhere."""
    H, W = frames_THWC.shape[1:3]
    h, w = int(0.88 * H), int(0.88 * W)
    y, x = rng.integers(0, H - h + 1), rng.integers(0, W - w + 1)
    return frames_THWC[:, y : y + h, x : x + w]


def half(frames_THWC: np.ndarray) -> np.ndarray:
    return resized(frames_THWC, *(side // 2 for side in frames_THWC.shape[1:3]))


CHANGES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "none": lambda frames, rng: frames,
    "H.264, CRF 23": lambda frames, rng: encoded(frames, "libx264", 23),
    "H.264, CRF 28": lambda frames, rng: encoded(frames, "libx264", 28),
    "0.5x resize": lambda frames, rng: half(frames),
    "0.5x resize, H.264, CRF 23": lambda frames, rng: encoded(half(frames), "libx264", 23),
    "2/3x resize": lambda frames, rng: resized(frames, *(2 * side // 3 for side in frames.shape[1:3])),
    "12 % crop": cropped,
    "12 % crop, H.264, CRF 23": lambda frames, rng: encoded(cropped(frames, rng), "libx264", 23),
    "frame rate x 0.7, H.264, CRF 23": lambda frames, rng: encoded(
        frames[np.arange(0, len(frames), 1.43).astype(int)], "libx264", 23
    ),
    "VP9, CRF 32": lambda frames, rng: encoded(frames, "libvpx-vp9", 32),
}


def generated(count: int, frames: int) -> list[np.ndarray]:
    """Clips of the bundled model; the first frames of each."""
    import sora_jax

    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    return [video.frames[:frames] for video in sora_jax.load().generate(prompts, seed=list(range(count)))]


def windows(paths: list[str], side: int, count: int, frames: int, rng: np.random.Generator) -> list[np.ndarray]:
    """`count` windows of `frames` frames and side x side pixels, from anywhere in the videos, halved where they fit."""
    clips = []
    for number in range(count):
        path = paths[number % len(paths)]
        frames_THWC, _ = media.read(path)
        if len(frames_THWC) < frames:
            raise InputError(f"{path} has {len(frames_THWC)} frames; --frames is {frames}")
        frames_THWC = frames_THWC[(start := rng.integers(0, len(frames_THWC) - frames + 1)) : start + frames]
        shortest = min(frames_THWC.shape[1:3])
        cut = 2 * side if shortest >= 2 * side else min(side, shortest)
        y, x = (rng.integers(0, length - cut + 1) for length in frames_THWC.shape[1:3])
        clips.append(resized(frames_THWC[:, y : y + cut, x : x + cut], side, side, "linear"))
    return clips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", nargs="+", metavar="FILE", help="videos to cut clips from (default: generate them)")
    parser.add_argument("--side", type=int, default=256, help="height and width of clips cut from files (default: 256)")
    parser.add_argument("--frames", type=int, default=33, help="frames of a clip, 1 to 33 (default: 33)")
    parser.add_argument("--num", type=int, default=32, help="clips (default: 32)")
    parser.add_argument("--keys", type=int, default=200, help="unmarked clips, each under a random key (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    try:
        if options.clips:
            clips = windows(options.clips, options.side, options.num, options.frames, rng)
        else:
            clips = generated(options.num, options.frames)
    except InputError as error:
        parser.error(str(error))
    T, H, W, _ = clips[0].shape
    keys = [rng.bytes(32) for _ in clips]
    payloads = [int(payload) for payload in rng.integers(0, 2**16, len(clips))]
    marked = [mark.embed(*job) for job in zip(clips, payloads, keys, strict=True)]
    start = time.perf_counter()
    for job in list(zip(clips, payloads, keys, strict=True))[:8]:
        mark.embed(*job)
    milliseconds = 1000 * (time.perf_counter() - start) / min(len(clips), 8) / T
    errors = [np.mean((after.astype(float) - before) ** 2) for before, after in zip(clips, marked, strict=True)]
    psnr = [10 * math.log10(255**2 / error) for error in errors]
    print(f"{len(clips)} clips of {T} frames of {H}x{W}; PSNR {np.mean(psnr):.2f} dB, at least {min(psnr):.2f} dB;")
    print(f"embedding {milliseconds:.2f} ms a frame.\n")
    print("| change | 16 bits recovered | log10 of the bound on chance: median | weakest |")
    print("|---|---|---|---|")
    for name, change in CHANGES.items():
        found = [mark.detect(change(frames, rng), key) for frames, key in zip(marked, keys, strict=True)]
        right = sum(one.payload == payload for one, payload in zip(found, payloads, strict=True))
        chances = [one.log10_chance for one in found]
        print(f"| {name} | {right} of {len(clips)} | {np.median(chances):.1f} | {max(chances):.1f} |", flush=True)
    wrong, least = 0, 0.0
    for number in range(options.keys):
        found = mark.detect(clips[number % len(clips)], rng.bytes(32))
        wrong, least = wrong + found.found, min(least, found.log10_chance)
    print(f"\nUnmarked clips under random keys: {wrong} of {options.keys} found, least log10 chance {least:.1f}.")


if __name__ == "__main__":
    main()
