"""The moving picture of the README: videos of the bundled model, first seed each, side by side.

python experiments/readme_samples.py docs/samples.gif
"""

import argparse

import numpy as np

import sora_jax
from sora_jax.safety.provenance import together

PROMPTS = (
    "a large red ball rolls to the right",
    "a large blue cube slides to the left behind a gray wall",
    "a gray truck drives past a large green star",
    "a large yellow pyramid rises",
    "the camera zooms in on a pink ball",
    "a large white cube falls at night",
)
COLUMNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="the file to write, .gif or .mp4")
    output = parser.parse_args().output
    generator = sora_jax.load()
    videos = generator.generate(PROMPTS, seed=[0] * len(PROMPTS))
    frames = [video.frames for video in videos]
    rows = [np.concatenate(frames[i : i + COLUMNS], axis=2) for i in range(0, len(frames), COLUMNS)]
    claim = together([video.claim for video in videos])
    sheet = sora_jax.Video(np.concatenate(rows, axis=1), videos[0].fps, claim)
    print(sheet.save(output))


if __name__ == "__main__":
    main()
