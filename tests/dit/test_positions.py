"""Rotary positions depend on differences of positions only."""

import numpy as np
import pytest

from sora_jax.dit.positions import axis_widths, rotary_angles, rotate


def test_a_head_of_128_is_shared_as_in_wan():
    assert axis_widths(128) == (44, 42, 42)


@pytest.mark.parametrize("head_width", [12, 16, 64, 128])
def test_shares_are_even_and_use_up_the_head(head_width):
    widths = axis_widths(head_width)
    assert sum(widths) == head_width
    assert not any(width % 2 for width in widths)


def test_scores_depend_on_relative_positions_only():
    grid, head_width = (5, 6, 7), 32
    time, space = rotary_angles(*grid, head_width)
    space = space.reshape(*grid[1:], -1)
    q, k = np.random.default_rng(0).normal(size=(2, 1, 2, 2, 4, head_width)).astype(np.float32)

    def scores(f, y, x):
        window = time[f : f + 2], space[y : y + 2, x : x + 2].reshape(4, -1)
        return np.einsum("bkfse,bkgte->bkfsgt", rotate(q, window), rotate(k, window))

    here = scores(0, 0, 0)
    for shift in [(3, 0, 0), (0, 4, 0), (0, 0, 5), (1, 2, 3)]:
        np.testing.assert_allclose(scores(*shift), here, atol=1e-4)
    unrotated = np.einsum("bkfse,bkgte->bkfsgt", q, k)
    assert np.abs(here - unrotated).max() > 0.1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_axis_turns_its_own_coordinates(axis):
    grid = [1, 1, 1]
    grid[axis] = 2
    time, space = rotary_angles(*grid, 24)
    first, second = (np.concatenate([time[i if axis == 0 else 0], space[0 if axis == 0 else i]]) for i in (0, 1))
    ends = np.cumsum([0, *axis_widths(24)]) // 2
    turned = np.zeros(12, bool)
    turned[ends[axis] : ends[axis + 1]] = True
    np.testing.assert_array_equal(first, 0)
    np.testing.assert_array_equal(second != 0, turned)


def test_rotation_keeps_lengths():
    x = np.random.default_rng(0).normal(size=(1, 2, 2, 6, 16)).astype(np.float32)
    turned = rotate(x, rotary_angles(2, 2, 3, 16))
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
