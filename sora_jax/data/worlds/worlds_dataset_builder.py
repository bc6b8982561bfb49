"""The procedural worlds as a TFDS data set: clips drawn once and stored with their captions and ground truth.

Writing and reading need no TensorFlow (the command `tfds build` does). This writes data/worlds/tiny/1.1.0:

    from sora_jax.data.worlds.worlds_dataset_builder import Builder, WorldsConfig
    Builder(config="tiny", data_dir="data").download_and_prepare()

Without `config` it writes 10500 clips of 33 frames at 128x128, about 1.8 GB. Other sizes are other configs:

    config = WorldsConfig(name="small", frames=9, size=(64, 64), train_clips=1000, held_out_clips=100)
    builder = Builder(config=config, data_dir="data")
    builder.download_and_prepare()
    clip = builder.as_data_source("train")[0]

Training reads it with `--config.data.dir=data/worlds/small/1.1.0 --config.frames=9 --config.size=64`.
"""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
import tensorflow_datasets as tfds

from sora_jax.data.worlds.drawing import HELD_OUT, draw_clips
from sora_jax.data.worlds.render import Truth, render
from sora_jax.data.worlds.scenes import Scene, sample_scene
from sora_jax.errors import InputError

FIRST_NUMBER = {"train": 0, "held_out": HELD_OUT}


@dataclasses.dataclass(eq=False)
class WorldsConfig(tfds.core.BuilderConfig):
    """What to write. TFDS reuses a folder of the same name, so other contents need another name.

    Attributes:
        name: the folder of the config in the data set.
        frames: frames T of a clip.
        size: height H and width W in pixels.
        train_clips, held_out_clips: clips in each split.
        captions: captions of each clip.
        seed: other seeds give other scenes.

    Raises:
        InputError: a size or number of things below 1.
    """

    frames: int = 33
    size: tuple[int, int] = (128, 128)
    train_clips: int = 10_000
    held_out_clips: int = 500
    captions: int = 4
    seed: int = 0

    def __post_init__(self):
        counts = {"height": self.size[0], "width": self.size[1]}
        for name in ("frames", "train_clips", "held_out_clips", "captions"):
            counts[name] = getattr(self, name)
        for name, count in counts.items():
            if count < 1:
                raise InputError(f"worlds data set: {name} is {count}; it must be at least 1")


class Builder(tfds.core.GeneratorBasedBuilder):
    """Splits "train" and "held_out": in the latter the first object is one of `vocabulary.UNSEEN`.

    Clip n of a split is a function of the seed and n, and a split keeps that order. The features of a clip:

        video     uint8 [T, H, W, 3], 0 to 255
        captions  one on each line
        number    what the key of the scene is folded with, from `FIRST_NUMBER[split]` on
        scene     the fields of `scenes.Scene`: `render(Scene(**clip["scene"]), T, (H, W))` draws it again
        truth     the fields of `render.Truth`: colour, shape and size of both objects, where they are and how
                  much of them is visible in each frame, and the camera

    Ids are indices into the tuples of `vocabulary`. Devices of different kinds may round pixels differently.
    """

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES = {"1.0.0": "First release.", "1.1.0": "Scenes have a backdrop."}
    BUILDER_CONFIGS = [
        WorldsConfig(name="128x128x33", description="The size of the bundled model."),
        WorldsConfig(name="tiny", description="For tests.", frames=5, size=(32, 32), train_clips=8, held_out_clips=4),
    ]

    def __init__(self, *, file_format: str = "array_record", **kwargs):
        super().__init__(file_format=file_format, **kwargs)  # the default of TFDS needs TensorFlow

    def _info(self) -> tfds.core.DatasetInfo:
        config = self.builder_config
        scene = jax.eval_shape(sample_scene, jax.random.key(0))
        truth = jax.eval_shape(lambda scene: render(scene, config.frames, config.size)[1], scene)
        return self.dataset_info_from_configs(
            description="Simple shapes that move through procedural worlds, with captions and ground truth.",
            features=tfds.features.FeaturesDict(
                {
                    "video": tfds.features.Tensor(
                        shape=(config.frames, *config.size, 3), dtype=np.uint8, encoding="zlib"
                    ),
                    "captions": tfds.features.Text(),
                    "number": tfds.features.Scalar(np.int64),
                    "scene": _features(scene),
                    "truth": _features(truth),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager) -> dict:
        config = self.builder_config
        return {
            "train": self._generate_examples("train", config.train_clips),
            "held_out": self._generate_examples("held_out", config.held_out_clips),
        }

    def _generate_examples(self, split: str, clips: int) -> Iterator[tuple[int, dict]]:
        config, first = self.builder_config, FIRST_NUMBER[split]
        return enumerate(
            draw_clips(
                range(first, first + clips),
                seed=config.seed,
                frames=config.frames,
                size=config.size,
                captions=config.captions,
                unseen=split == "held_out",
            )
        )


def _features(arrays: Scene | Truth) -> dict[str, tfds.features.Tensor]:
    return {
        name: tfds.features.Tensor(shape=array.shape, dtype=array.dtype) for name, array in arrays._asdict().items()
    }
