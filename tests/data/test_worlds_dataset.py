"""The worlds as a stored data set: what is written is what the scenes show; batches can be resumed."""

import itertools
import subprocess
import sys

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from sora_jax.data import clips, loading
from sora_jax.data.worlds import vocabulary
from sora_jax.data.worlds.drawing import draw_clips
from sora_jax.data.worlds.render import Truth, render
from sora_jax.data.worlds.scenes import Scene
from sora_jax.data.worlds.worlds_dataset_builder import WorldsConfig
from sora_jax.errors import InputError

FRAMES, SIZE = 5, (32, 32)
BUILD_AND_READ = """
import sys
from sora_jax.data import clips
from sora_jax.data.worlds.worlds_dataset_builder import Builder

builder = Builder(config="tiny", data_dir=sys.argv[1])
builder.download_and_prepare()
clips.stored(builder.data_dir, "train")[0]
assert "tensorflow" not in sys.modules
print(builder.data_dir)
"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """The folder of a tiny data set, written by another process that never imports TensorFlow."""
    command = [sys.executable, "-c", BUILD_AND_READ, str(tmp_path_factory.mktemp("data"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()[-1]


@pytest.fixture(scope="module")
def stored(data_dir):
    builder = tfds.builder_from_directory(data_dir)
    return {split: list(builder.as_data_source(split)) for split in ("train", "held_out")}


def draw(numbers):
    return list(draw_clips(numbers, seed=0, frames=FRAMES, size=SIZE, captions=4))


@pytest.fixture(scope="module")
def drawn():
    return draw(range(8))


def test_stored_clips_are_those_that_this_process_draws(stored, drawn):
    assert len(stored["train"]) == 8 and len(stored["held_out"]) == 4
    for read, clip in zip(stored["train"], drawn, strict=True):
        assert read["captions"].decode() == clip["captions"]
        jax.tree.map(np.testing.assert_array_equal, {**read, "captions": 0}, {**clip, "captions": 0})
        assert read["video"].dtype == np.uint8


def test_a_clip_does_not_depend_on_which_others_are_drawn(drawn):
    for clip, same in zip(draw([5, 2, 7]), [drawn[n] for n in (5, 2, 7)], strict=True):
        assert clip["captions"] == same["captions"]
        np.testing.assert_array_equal(clip["video"], same["video"])


def test_stored_scenes_draw_the_stored_clips_again(stored):
    scenes = [Scene(**clip["scene"]) for clip in stored["train"]]
    scenes_B = jax.tree.map(lambda *parts: np.stack(parts), *scenes)
    draw = jax.jit(jax.vmap(lambda scene: render(scene, FRAMES, SIZE)))
    video, truth = jax.tree.map(np.asarray, draw(scenes_B))
    # Another compiled program than the one that wrote them: it may round a pixel the other way.
    np.testing.assert_allclose(np.round(video * 255), [clip["video"] for clip in stored["train"]], atol=1)
    for i, clip in enumerate(stored["train"]):
        for name, value in Truth(**clip["truth"])._asdict().items():
            np.testing.assert_allclose(value, getattr(truth, name)[i], atol=1e-6)


def test_captions_and_truth(stored):
    for clip in itertools.chain(*stored.values()):
        captions = clip["captions"].decode().split("\n")
        assert len(captions) == 4 and all(captions)
        truth = Truth(**clip["truth"])
        assert truth.center_T2.shape == (2, FRAMES, 2) and truth.visible_T.shape == (2, FRAMES)
        assert truth.color.shape == truth.shape.shape == truth.size.shape == truth.present.shape == (2,)
        assert truth.visible_T.min() >= 0 and truth.visible_T.max() <= 1


def test_splits_share_no_number_and_only_one_shows_unseen_combinations(stored):
    numbers = [clip["number"] for clip in itertools.chain(*stored.values())]
    assert len(set(numbers)) == len(numbers)
    for split, clips_ in stored.items():
        for clip in clips_:
            color, shape = clip["truth"]["color"][0], clip["truth"]["shape"][0]
            pair = (vocabulary.COLORS[color], vocabulary.SHAPES[shape])
            assert (pair in vocabulary.UNSEEN) == (split == "held_out")


def pick(clip, rng):
    return {"video": clip["video"], "random": rng.integers(2**31)}


def take(data_dir, start, count, batch=4, seed=3):
    return list(itertools.islice(loading.batches(clips.stored(data_dir, "train"), pick, batch, seed, start), count))


def test_batches_resume_exactly(data_dir):
    stream = take(data_dir, 0, 7)
    assert stream[0]["video"].shape == (4, FRAMES, *SIZE, 3) and stream[0]["video"].dtype == np.uint8
    jax.tree.map(np.testing.assert_array_equal, stream[3:], take(data_dir, 3, 4))


def names(batches, stored):
    """Which stored clips the batches hold, in order."""
    numbers = {clip["video"].tobytes(): clip["number"] for clip in stored["train"]}
    return [numbers[video.tobytes()] for batch in batches for video in batch["video"]]


def test_each_pass_has_every_clip_once_in_its_own_order(data_dir, stored):
    passes = np.reshape(names(take(data_dir, 0, 8), stored), (4, 8))
    assert (np.sort(passes) == np.arange(8)).all()
    assert len({tuple(order) for order in passes}) > 1
    assert names(take(data_dir, 0, 8, seed=4), stored) != list(passes.ravel())


def test_what_is_random_about_a_clip_differs_from_pass_to_pass(data_dir):
    numbers = np.concatenate([batch["random"] for batch in take(data_dir, 0, 16)])
    assert len(set(numbers.tolist())) == 64


class Rows:
    """Where one of two processes has its rows of a batch, each on two devices."""

    def __init__(self, process):
        self.part = slice(2 * process, 2 * process + 2)

    def addressable_devices_indices_map(self, shape):
        return dict.fromkeys(("device 0", "device 1"), (self.part,))


def test_processes_read_what_one_would_each_its_own_rows(data_dir, monkeypatch):
    monkeypatch.setattr(jax, "make_array_from_process_local_data", lambda sharding, rows: rows)
    source, whole = clips.stored(data_dir, "train"), take(data_dir, 1, 3)
    shares = [itertools.islice(loading.batches(source, pick, 4, 3, 1, Rows(process)), 3) for process in range(2)]
    for batch, *halves in zip(whole, *shares, strict=True):
        assert [len(half["video"]) for half in halves] == [2, 2]
        jax.tree.map(lambda all_, *parts: np.testing.assert_array_equal(all_, np.concatenate(parts)), batch, *halves)
    with pytest.raises(InputError, match="batch is 0"):
        take(data_dir, 0, 1, batch=0)


def test_errors_say_what_is_wrong(data_dir, tmp_path):
    with pytest.raises(InputError, match="no data set there"):
        clips.stored(tmp_path, "train")
    with pytest.raises(InputError, match="no split 'test'; there are train, held_out"):
        clips.stored(data_dir, "test")
    with pytest.raises(InputError, match=r"clip 0 is \[5, 32, 32, 3\]; the configuration asks for \[9,"):
        clips.stored_as(data_dir, "train", 9, 32)
    with pytest.raises(InputError, match="frames is 0"):
        WorldsConfig(name="none", frames=0)
