"""Fits the prompt gate's classifier, after a change of its examples, its encoder or the worlds.

    python experiments/fit_gate.py
    python experiments/fit_gate.py --sums    # after a change of the policy, the names or the vocabulary

A softmax regression from sentence embeddings and tokens to the categories and "benign", with a penalty on the
squared weights, by L-BFGS. It writes sora_jax/safety/data/classifier.safetensors, and its digest beside those of the
gate's other files; with `--sums` the digests only. It takes some ten minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import re
import zlib
from collections.abc import Iterator

import jax
import numpy as np
import safetensors.numpy
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import log_softmax

from sora_jax.data.worlds.captions import caption
from sora_jax.data.worlds.scenes import sample_scene
from sora_jax.safety.normalize import DATA, SUMS, forms
from sora_jax.safety.semantic import BENIGN, BUCKETS, CLASSIFIER, WIDTH, buckets, encoder, windows

PER_LINE = 40  # examples drawn from one line
CAPTIONS = 6000  # of the worlds: what the bundled model was made for is harmless, in all the words that it knows
LONG = 10_000  # prompts made of two to four examples, each of
SHORT = 160  # fewer characters than these, so that all of them fit into what is read at a time
PENALTY = 1e-5
WORDS = 2.0  # how much words count beside the embedding, before the penalty
# Words about the picture, a place or a time say nothing about what it shows: half of the examples get some, harmful and
# benign alike.
_BEFORE = (
    "cinematic shot of", "drone footage of", "close-up of", "a video of", "anime style,", "photorealistic",
    "slow motion,", "generate a clip of", "black and white film,", "handheld camera,", "wide shot,",
    "a short film about", "3d animation of", "please make a video where", "claymation,", "vintage footage of", "pov,",
    "music video,", "trailer:", "Scene:",
)  # fmt: skip
_AFTER = (
    ", 4k", ", highly detailed", ", dramatic lighting", ", shot on 35mm", ", golden hour", ", unreal engine",
    ", oil painting", ", ultra realistic, 8k", ", soft light", ", neon colors", ", in the rain", ", slow zoom",
    ", documentary style", ".", ", no text", ", studio ghibli", ", grainy vhs", ", moody atmosphere", ", at night",
    ", the camera slowly moves in", ", shot on a 50mm lens", ", shallow depth of field, bokeh", ", warm colors",
    ", filmed with a phone", ", a cat sleeps in the background", ". Birds fly over a calm lake.", " in Boston",
    " in Paris", " in Lisbon", " in Kyoto", " in Buenos Aires, Argentina", " in Cape Town", " in Krakow, Poland",
    " in Mumbai", " in a small town", " in the mountains", " in the desert", " in the countryside",
    " in the old town of Prague", " near Oslo", " outside Dallas, Texas", " on an island", " by the sea",
    " in Scotland", " in northern Italy", " in the suburbs", " in a foreign country", " at dawn", " at noon",
    " in the evening", " on a Sunday morning", " in winter", " last summer", " on a rainy day", " in 1985",
    " under a full moon", " while it snows", " after lunch", " on a foggy day",
)  # fmt: skip


def read_examples() -> list[tuple[str, int, str]]:
    """Category, line and text of every example that is drawn, the same every time."""
    category, examples = None, []
    for number, line in enumerate((DATA / "examples.txt").read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("["):
            category = line.strip("[]")
        elif line and not line.startswith("#"):
            parts = [part.split("|") for part in re.split(r"[{}]", line)]
            texts = ["".join(choice) for choice in itertools.product(*parts)]
            random = np.random.default_rng(zlib.crc32(line.encode()))  # no line changes what others give
            chosen = random.permutation(len(texts))[:PER_LINE]
            examples += [(category, number, _dressed(texts[i], random)) for i in chosen]
    random = np.random.default_rng(0)
    examples += list(_long(examples, random))
    # Every kind of scene counts as a line.
    return examples + [(BENIGN, number + 1 + kind, text) for kind, text in _captions(random)]


def _captions(random: np.random.Generator) -> list[tuple[int, str]]:
    """Scenes of the worlds: what kind each is, and how it may be asked for."""
    scenes = jax.jit(jax.vmap(sample_scene))(jax.random.split(jax.random.key(0), CAPTIONS))
    scenes = jax.tree.map(np.asarray, scenes)
    each = (jax.tree.map(lambda part, i=i: part[i], scenes) for i in range(CAPTIONS))
    return [(int(scene.kind), caption(scene, random)) for scene in each]


def _long(examples: list[tuple[str, int, str]], random: np.random.Generator) -> Iterator[tuple[str, int, str]]:
    """Prompts of several examples, as long ones are: harmless ones, or one that is not among them."""
    by_harm = {
        harm: [example for example in examples if (example[0] != BENIGN) == harm and len(example[2]) < SHORT]
        for harm in (True, False)
    }
    for i in range(LONG):
        kinds = [False] * random.integers(2, 5)
        kinds[random.integers(len(kinds))] = i % 2 == 0
        chosen = [by_harm[harm][random.integers(len(by_harm[harm]))] for harm in kinds]
        category, number, _ = next((example for example in chosen if example[0] != BENIGN), chosen[0])
        between = (". ", ", ")[random.integers(2)]
        yield category, number, between.join(text.rstrip(".") for _, _, text in chosen)


def _dressed(text: str, random: np.random.Generator) -> str:
    kind = random.integers(6)
    if kind in (0, 2):
        text = f"{_BEFORE[random.integers(len(_BEFORE))]} {text}"
    if kind in (1, 2):
        text = text.rstrip(".") + _AFTER[random.integers(len(_AFTER))]
    return text


def words_of(tokens: list[list[int]]) -> sparse.csr_matrix:
    """[N, BUCKETS]: in what buckets the tokens of a text are, of norm `WORDS`."""
    found = [buckets(one) for one in tokens]
    counts = np.array([len(rows) for rows in found])
    values = np.repeat(WORDS / np.maximum(counts, 1) ** 0.5, counts)
    starts = np.concatenate([[0], np.cumsum(counts)])
    return sparse.csr_matrix((values, np.concatenate(found).astype(np.int64), starts), (len(tokens), BUCKETS))


def fit(
    vectors: np.ndarray, words: sparse.csr_matrix, labels: np.ndarray, weights: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Softmax regression.

    Args:
        vectors: [N, WIDTH], embeddings; words: [N, BUCKETS], see `words_of`.
        labels: int [N]; weights: [N], how much each example counts.

    Returns:
        [WIDTH, classes], [BUCKETS, classes] and the bias [classes], float32.
    """
    turned = words.T.tocsr()
    target = np.eye(classes)[labels]
    weights = weights / weights.sum()
    ends = np.cumsum([WIDTH * classes, BUCKETS * classes])

    def parts(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        of_vectors, of_words, bias = np.split(flat, ends)
        return of_vectors.reshape(-1, classes), of_words.reshape(-1, classes), bias

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        of_vectors, of_words, bias = parts(flat)
        log_p = log_softmax(vectors @ of_vectors + words @ of_words + bias, axis=1)
        error = weights[:, None] * (np.exp(log_p) - target)
        penalised = flat[: ends[-1]]
        value = -(weights * log_p[np.arange(len(labels)), labels]).sum() + PENALTY / 2 * (penalised**2).sum()
        gradient = np.concatenate([(vectors.T @ error).ravel(), (turned @ error).ravel(), error.sum(0)])
        gradient[: ends[-1]] += PENALTY * penalised
        return value, gradient

    start = np.zeros(ends[-1] + classes)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 200})
    return tuple(part.astype(np.float32) for part in parts(found.x))


def write_sums() -> None:
    """The digests of the files that decide about prompts, by which damage is found."""
    names = (CLASSIFIER, "names.txt", "policy.toml", "vocab.txt")
    lines = [f"{hashlib.sha256((DATA / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (DATA / SUMS).write_text("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sums", action="store_true", help="only write the digests of the gate's files")
    if parser.parse_args().sums:
        write_sums()
        return
    examples = read_examples()
    names = sorted({category for category, _, _ in examples} - {BENIGN})
    classes = [*names, BENIGN]
    encode = encoder()
    texts = [windows(forms(text).original)[0] for _, _, text in examples]
    labels = np.array([classes.index(category) for category, _, _ in examples])
    # Every line counts as much as the root of how many examples it gave, harmful and benign ones the same in all.
    lines = np.array([number for _, number, _ in examples])
    weights = 1 / np.sqrt(np.bincount(lines)[lines])
    is_benign = labels == len(names)
    weights[is_benign] *= weights[~is_benign].sum() / weights[is_benign].sum()
    vectors, words = encode(texts), words_of([encode.tokens(text) for text in texts])
    fitted = fit(vectors.astype(np.float64), words, labels, weights, len(classes))
    weight, words, bias = (part[..., :-1] - part[..., -1:] for part in fitted)
    words = (words * WORDS).astype(np.float16)
    tensors = {"weight": weight, "words": words, "bias": bias}
    safetensors.numpy.save_file(tensors, DATA / CLASSIFIER, {"names": " ".join(names)})
    write_sums()
    print(f"{len(examples)} examples of {', '.join(classes)}: {DATA / CLASSIFIER}")


if __name__ == "__main__":
    main()
