"""Drawing numbered clips of the worlds: the video, what people would say of it, and the truth."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.data.worlds.captions import caption
from sora_jax.data.worlds.render import Truth, render
from sora_jax.data.worlds.scenes import Scene, mistake, sample_scene

# Training uses numbers and seeds below it. What is held out has those from here on, and so keys of its own.
HELD_OUT = 2**31
_BATCH = 8


def draw_clips(
    numbers: Sequence[int],
    *,
    seed: int,
    frames: int,
    size: tuple[int, int],
    captions: int,
    unseen: bool = False,
    mistaken: bool = False,
) -> Iterator[dict]:
    """One clip for each of `numbers`, a function of the seed and the number alone, as NumPy arrays:

        video     uint8 [T, H, W, 3], 0 to 255
        captions  one on each line
        number    0 <= number < 2**32
        scene     the fields of `scenes.Scene`
        truth     the fields of `render.Truth`

    Args:
        captions: how many there are of each clip.
        unseen: the first object is one of `vocabulary.UNSEEN`, which otherwise never appear.
        mistaken: with each clip another video, "mistaken", as `scenes.mistake` has it.
    """
    numbers = np.asarray(numbers, np.int64)
    for start in range(0, len(numbers), _BATCH):
        # The last batch is filled up: all clips come from one compiled program.
        chosen = np.minimum(start + np.arange(_BATCH), len(numbers) - 1)
        numbers_B = numbers[chosen].astype(np.uint32)
        scenes = _sample(numbers_B, seed, unseen)
        drawn = jax.tree.map(np.asarray, (scenes, *_render(scenes, frames, tuple(size))))
        others = {}
        if mistaken:
            others["mistaken"] = np.asarray(_render(_mistake(numbers_B, seed, scenes), frames, tuple(size))[0])
        for i, number in enumerate(numbers[start : start + _BATCH].tolist()):
            scene, video_THWC, truth = jax.tree.map(lambda a, i=i: a[i], drawn)
            rng = np.random.default_rng((seed, number))
            yield {
                "video": video_THWC,
                **{name: video_BTHWC[i] for name, video_BTHWC in others.items()},
                "captions": "\n".join(caption(scene, rng) for _ in range(captions)),
                "number": number,
                "scene": scene._asdict(),
                "truth": truth._asdict(),
            }


# Programs of their own, since sampling is compiled once for each split and drawing only once.
@functools.partial(jax.jit, static_argnames=("seed", "unseen"))
def _sample(numbers_B, seed, unseen) -> Scene:
    keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(seed), number))(numbers_B)
    return jax.vmap(lambda key: sample_scene(key, unseen=unseen))(keys)


@functools.partial(jax.jit, static_argnames="seed")
def _mistake(numbers_B, seed, scenes) -> Scene:
    keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(~seed), number))(numbers_B)
    return jax.vmap(mistake)(keys, scenes)


@functools.partial(jax.jit, static_argnames=("frames", "size"))
def _render(scenes, frames, size) -> tuple[jax.Array, Truth]:
    video_BTHWC, truth = jax.vmap(lambda scene: render(scene, frames, size))(scenes)
    return jnp.round(video_BTHWC * 255).astype(jnp.uint8), truth
