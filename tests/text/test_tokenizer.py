"""Prompts to bytes and back."""

import numpy as np
import pytest

from sora_jax.text.tokenizer import END, PAD, VOCABULARY_SIZE, clean, tokenize


def untokenize(ids_L) -> str:
    return bytes(int(i) - 3 for i in ids_L if i > 2).decode()


@pytest.mark.parametrize("prompt", ["a red ball", "ein grüner würfel", "赤い球", "🔴 rolls"])
def test_round_trip(prompt):
    ids_BL = tokenize([prompt], 40)
    assert ids_BL.shape == (1, 40) and ids_BL.dtype == np.int32
    assert untokenize(ids_BL[0]) == prompt
    length = len(prompt.encode())
    assert ids_BL[0, length] == END
    assert (ids_BL[0, length + 1 :] == PAD).all() and (ids_BL[0, :length] > 2).all()
    assert ids_BL.max() < VOCABULARY_SIZE


def test_golden_ids():
    np.testing.assert_array_equal(tokenize(["ab", ""], 4), [[100, 101, END, PAD], [END, PAD, PAD, PAD]])


def test_what_does_not_fit_is_cut_and_still_ends():
    for length in (1, 4, 10):
        ids_L = tokenize(["a red ball rolls"], length)[0]
        assert ids_L[-1] == END
        assert untokenize(ids_L) + tokenize.unread("a red ball rolls", length) == "a red ball rolls"
    # A prompt of exactly length - 1 bytes loses nothing.
    assert untokenize(tokenize(["ball"], 5)[0]) == "ball" and tokenize.unread("ball", 5) == ""
    # Nor is a letter of several bytes read by half.
    assert untokenize(tokenize(["balé"], 5)[0]) == "bal" and tokenize.unread("balé", 5) == "é"


@pytest.mark.parametrize("prompt", ["A Red  Ball.", " a red\tball \n", "a red ball", "ａ ｒｅｄ ｂａｌｌ"])
def test_case_spaces_full_stop_and_wide_letters_do_not_matter(prompt):
    assert clean(prompt) == "a red ball"
    np.testing.assert_array_equal(tokenize([prompt], 16), tokenize(["a red ball"], 16))
