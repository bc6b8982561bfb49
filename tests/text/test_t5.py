"""The text encoder: padding and neighbours in the batch leave no trace, and positions are those of T5."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.core import meta

from sora_jax.text import T5Encoder, TextConfig, tokenize
from sora_jax.text.t5 import position_buckets
from sora_jax.text.tokenizer import PAD

CONFIG = TextConfig(259, width=8, heads=2, head_width=6, feed_forward=16, layers=2, length=12, max_distance=20)
PROMPTS = ["a red ball", "up"]  # 11 and 3 tokens with the end


@pytest.fixture(scope="module", params=[False, True], ids=["positions per block", "shared positions"])
def encode(request):
    """ids -> features, with random parameters."""
    model = T5Encoder(dataclasses.replace(CONFIG, shared_positions=request.param))
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), tokenize(PROMPTS, 12)))["params"]
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: (0.4 * random.normal(size=leaf.shape)).astype(np.float32), shapes)
    compiled = jax.jit(model.apply)
    return lambda ids_BL: np.asarray(compiled({"params": params}, ids_BL))


def test_padding_does_not_change_the_features_of_real_tokens(encode):
    short, long = encode(tokenize(PROMPTS, 12)), encode(tokenize(PROMPTS, 20))
    assert short.shape == (2, 12, 8) and short.dtype == np.float32
    np.testing.assert_allclose(long[:, :12], short, atol=1e-5)
    assert np.abs(short[0, :11]).min(axis=-1).all()


def test_features_at_the_padding_are_zero(encode):
    features = encode(tokenize(PROMPTS, 12))
    assert not features[0, 11:].any() and not features[1, 3:].any()
    assert features[0, :11].any(axis=-1).all() and features[1, :3].any(axis=-1).all()


def test_the_padding_token_is_read_where_others_follow_it(encode):
    """Prompts may hold it, and only the end of a row is padding: so do the public implementations have it."""
    ids_BL = tokenize(PROMPTS, 12)
    ids_BL[0, 4] = PAD
    features, other = encode(ids_BL), encode(np.delete(ids_BL, 4, axis=1))
    assert features[0, :11].any(axis=-1).all() and not features[0, 11:].any()
    assert np.abs(features[0, 3] - other[0, 3]).max() > 1e-3  # its neighbours see it
    np.testing.assert_array_equal(features[1], encode(tokenize(PROMPTS, 12))[1])


def test_rows_of_a_batch_do_not_see_one_another(encode):
    together = encode(tokenize(PROMPTS, 12))
    other = encode(tokenize(["xyz", PROMPTS[1]], 12))
    np.testing.assert_array_equal(other[1], together[1])
    assert np.abs(other[0] - together[0]).max() > 0.01


def test_order_and_context_matter(encode):
    features = encode(tokenize(["ab", "ba"], 12))
    assert np.abs(features[0, 0] - features[1, 1]).max() > 0.01  # the same letter in another place
    other = encode(tokenize(["ab", "ac"], 12))
    assert np.abs(other[0, 0] - other[1, 0]).max() > 1e-3  # attention looks ahead too


def literal_bucket(offset: int, buckets: int, max_distance: int) -> int:
    """The rule of T5 for one offset (key - query), in whole numbers so that no logarithm is rounded."""
    half = buckets // 2
    exact, distance = half // 2, abs(offset)
    if distance < exact:
        bucket = distance
    else:
        # The largest k with log(distance / exact) / log(max_distance / exact) * (half - exact) >= k.
        power = half - exact
        bucket = exact
        while (
            bucket < half - 1
            and distance**power * exact ** (bucket + 1 - exact) >= max_distance ** (bucket + 1 - exact) * exact**power
        ):
            bucket += 1
    return bucket + (half if offset > 0 else 0)


@pytest.mark.parametrize("length,buckets,max_distance", [(300, 32, 128), (40, 16, 20)])
def test_position_buckets_follow_the_rule_of_t5(length, buckets, max_distance):
    table = position_buckets(length, buckets, max_distance)
    expected = [[literal_bucket(k - q, buckets, max_distance) for k in range(length)] for q in (0, length - 1)]
    np.testing.assert_array_equal(table[[0, -1]], expected)
    # Only the difference counts.
    np.testing.assert_array_equal(table[1:, 1:], table[:-1, :-1])
    assert table.min() == 0 and table.max() == buckets - 1


def test_golden_buckets():
    ends = [8, 12, 16, 23, 32, 46, 64, 91]  # first distances of buckets 8 to 15 with 32 buckets and 128
    row = position_buckets(128, 32, 128)[-1][::-1]  # by distance back
    np.testing.assert_array_equal(row[ends], range(8, 16))
    np.testing.assert_array_equal(row[np.array(ends[1:]) - 1], range(8, 15))
