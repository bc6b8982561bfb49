"""The invisible mark: 16 bits in the frames themselves, which survive much of what takes a manifest off.

A pattern is added to the luma of every frame. It repeats every `TILE` pixels along rows and columns, so that a crop
only shifts it, and it is the same in all frames of a clip, so that a change of the frame rate changes nothing. It is
made of waves of 5 to 13 pixels, which video codecs keep. The phases of these waves carry the bits and are a secret of
the installation: spread spectrum (Cox et al., 1997), tiled against crops (Kutter, 1998), where the embedder first takes
off part of what the frames themselves say at these waves (Malvar and Florencio, 2003).

`detect` compares the phases it finds with those of every payload, at every shift and at a few scales. How probable
such an agreement is in frames that never had the mark follows from the secret phases alone, whatever the frames show,
since the two are independent: see `_log10_chance`.

What it does not survive: sizes between `SCALES` (a crop that is stretched to the old size is one), turning, mirroring,
and another picture of the screen. Of less than about 64 x 64 pixels it is often not found.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.errors import InputError

TILE = 64  # pixels
WAVES = (5.0, 14.0)  # periods of a wave to a tile
PSNR = 40.3  # dB, of marked frames against unmarked ones
SCALES = (1.0, 0.5, 2 / 3, 0.75, 1.5, 2.0)  # of frames relative to the marked ones: where the mark is looked for
MOST_CHANCE = 1e-5  # of finding a mark where there is none
_LOOK = 12 * TILE  # rows and columns; more of them tell little more
_WORDS = 256  # each half of the waves carries eight bits
_LUMA = np.float32([0.299, 0.587, 0.114])
_NEAR = 16  # pixels, a power of two; what varies more slowly than this is left out
_AMPLITUDE = 255 * 10 ** (-PSNR / 20)  # root mean square of the mark
_CANCEL = 0.15  # of the mark's energy at most is for taking off what the frames say at its waves


@dataclass(frozen=True)
class Detection:
    """What was found.

    Attributes:
        found: whether the agreement is too good for chance.
        payload: the 16 bits, or None.
        log10_chance: a bound on the probability, as a power of ten, of such an agreement in unmarked frames.
        scale: size of these frames relative to the marked ones.
    """

    found: bool
    payload: int | None
    log10_chance: float
    scale: float


def embed(frames_THWC: np.ndarray, payload: int, key: bytes) -> np.ndarray:
    """Frames with the mark, uint8 [T, H, W, 3] in RGB, each at about `PSNR` dB from what it was.

    Frames of any size take it; how much of it can be found again depends on how many pixels there are.

    Args:
        frames_THWC: uint8 [T, H, W, 3], RGB.
        payload: 0 to 65535.
        key: the secret, 32 bytes.
    """
    if not 0 <= payload < _WORDS**2:
        raise InputError(f"the mark carries 0 to {_WORDS**2 - 1}, not {payload}")
    words = zip(_phases(key), divmod(payload, _WORDS), strict=True)
    phases_N = np.stack([phases_WM[word] for phases_WM, word in words], -1).reshape(-1)
    tile = _tile(*_measured(frames_THWC), np.exp(1j * phases_N).astype(np.complex64))
    marked_THWC = np.empty(frames_THWC.shape, np.uint8)
    for marked_HWC, frame_HWC in zip(marked_THWC, frames_THWC, strict=True):
        marked_HWC[:] = _add(frame_HWC, tile)
    return marked_THWC


def detect(frames_THWC: Iterable[np.ndarray], key: bytes) -> Detection:
    """Looks for a mark made with `key`; frames as for `embed`, or one after the other: in the middle of large ones."""
    plane_HW, _ = _measured(map(_middle, frames_THWC))
    words_2MW = np.exp(-1j * _phases(key)).swapaxes(1, 2).astype(np.complex64)
    found = []
    for scale in SCALES:
        if min(round(side / scale) for side in plane_HW.shape) < TILE // 4:
            continue
        # Resized and folded by matrices: programs of JAX would be compiled for each size of frames and each scale.
        rows_YH, columns_XW = (_resized_and_folded(side, round(side / scale)) for side in plane_HW.shape)
        seen_N, weight_N = _heard(rows_YH @ plane_HW @ columns_XW.T)
        agreement, high, low = (x.item() for x in _best(seen_N, words_2MW))
        found.append((_log10_chance(agreement, weight_N), high * _WORDS + low, scale))
    if not found:
        return Detection(False, None, 0.0, 1.0)
    chance, payload, scale = min(found)
    chance = min(chance + math.log10(len(found) * TILE**2 * _WORDS**2), 0.0)  # any of so many would have been taken
    is_found = chance < math.log10(MOST_CHANCE)
    return Detection(is_found, payload if is_found else None, chance, scale)


@functools.cache
def _waves() -> np.ndarray:
    """Whole periods of the waves along rows and columns, [N, 2]; a wave and its mirror image count once. N is even."""
    limit = int(WAVES[1])
    y, x = np.meshgrid(np.arange(-limit, limit + 1), np.arange(limit + 1), indexing="ij")
    radius = np.hypot(y, x)
    chosen = (radius >= WAVES[0]) & (radius <= WAVES[1]) & ((x > 0) | (y > 0))
    waves_N2 = np.stack([y[chosen], x[chosen]], -1)
    waves_N2 = waves_N2[np.argsort(radius[chosen], kind="stable")]
    return waves_N2[: len(waves_N2) // 2 * 2]


@functools.lru_cache(maxsize=8)
def _phases(key: bytes) -> np.ndarray:
    """The secret phases of each word of each half, [2, W, N / 2], uniform; halves take every other wave."""
    seed = np.frombuffer(hashlib.sha256(b"sora_jax mark" + key).digest(), np.uint32)
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed.tolist())))
    return random.uniform(0, 2 * np.pi, (2, _WORDS, len(_waves()) // 2))


def _middle(frame_HWC: np.ndarray) -> np.ndarray:
    top, left = (max(side - _LOOK, 0) // 2 for side in frame_HWC.shape[:2])
    return frame_HWC[top : top + _LOOK, left : left + _LOOK]


def _measured(frames_THWC: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Means over the frames of what `_measure` gives of one.

    One frame is on the device at a time, here and where the mark is added: memory does not grow with the duration.
    """
    plane_HW, room, number = 0.0, 0.0, 0
    for frame_HWC in frames_THWC:
        one_HW, its_room = _measure(frame_HWC)
        number += 1
        plane_HW, room = plane_HW + np.asarray(one_HW), room + np.asarray(its_room)
    return plane_HW / np.float32(number), room / np.float32(number)


@jax.jit
def _measure(frame_HWC):
    """What differs from its surroundings, relative to how much they vary, [H, W]; and the sum of the strength so."""
    _, luma_HW, detail_HW, spread_HW = _detail(frame_HWC)
    return detail_HW / (spread_HW + 1), jnp.sum(_strength(luma_HW, spread_HW) / (spread_HW + 1))


@jax.jit
def _tile(plane_HW, room, word_N):
    """The pattern that carries a word in frames of which that was measured: [TILE, TILE], with a mean square of one."""
    # A wave of unit amplitude, half of it at its mirror image, adds `gain` to what the detector hears.
    waves_N2 = _waves()
    unit = math.sqrt(2 / len(waves_N2))  # so that the pattern has a mean square of one
    gain = 0.5 * unit * room
    heard_N = _at(jnp.fft.fft2(_fold(plane_HW)), waves_N2)
    # Waves that the frames have themselves, as far as they disagree with the word, are taken off in part.
    against_N = heard_N / gain * jnp.conj(word_N)
    against_N = jnp.minimum(against_N.real, 0) + 1j * against_N.imag
    energy = jnp.mean(jnp.abs(against_N) ** 2)
    share = jnp.minimum(energy, _CANCEL)
    drive_N = jnp.sqrt(1 - share) - against_N * jnp.sqrt(share / jnp.maximum(energy, 1e-9))
    spectrum_YX = jnp.zeros((TILE, TILE), jnp.complex64).at[waves_N2[:, 0], waves_N2[:, 1]].set(drive_N * word_N)
    tile = jnp.fft.ifft2(spectrum_YX).real
    return tile / jnp.sqrt(jnp.mean(tile**2))


@jax.jit
def _add(frame_HWC, tile):
    """A frame with the pattern, as strong as each place bears it."""
    x, luma_HW, _, spread_HW = _detail(frame_HWC)
    H, W = luma_HW.shape
    mark_HW = _strength(luma_HW, spread_HW) * jnp.tile(tile, (-(-H // TILE), -(-W // TILE)))[:H, :W]
    mark_HW *= _AMPLITUDE / jnp.sqrt(jnp.maximum(jnp.mean(mark_HW**2), 1e-6))
    return jnp.clip(jnp.round(x + mark_HW[..., None]), 0, 255).astype(jnp.uint8)


def _strength(luma_HW, spread_HW):
    """Of the mark: what is busy hides more than what is flat, and near black and white there is no room."""
    strength_HW = jnp.sqrt(jnp.clip(spread_HW, 2, 16)) * jnp.clip(jnp.minimum(luma_HW, 255 - luma_HW) / 8, 0.25, 1)
    return strength_HW * (_AMPLITUDE / jnp.sqrt(jnp.mean(strength_HW**2)))


def _detail(frame_HWC):
    """A frame in float32, its luma, what of that differs from the mean around it, and the root mean square of that."""
    x = frame_HWC.astype(jnp.float32)
    luma_HW = x @ _LUMA
    detail_HW = luma_HW - _blur(luma_HW)
    return x, luma_HW, detail_HW, jnp.sqrt(_blur(detail_HW**2))


def _blur(x_HW):
    """The mean over `_NEAR` x `_NEAR` pixels around each. Sums of twos, of fours and so on: few, and exact enough."""
    for axis in (0, 1):
        pads = [(0, 0)] * 2
        pads[axis] = (_NEAR // 2, _NEAR // 2 - 1)
        x_HW, span = jnp.pad(x_HW, pads, mode="edge"), 1
        while span < _NEAR:
            size = x_HW.shape[axis]
            x_HW = sum(jax.lax.slice_in_dim(x_HW, start, size - span + start, axis=axis) for start in (0, span))
            span *= 2
    return x_HW / _NEAR**2


def _fold(plane_HW):
    """The sum of all blocks of two by two tiles of a plane, [2 TILE, 2 TILE]: they hold whole periods of all waves."""
    H, W = (-(-side // (2 * TILE)) for side in plane_HW.shape)
    pads = [(0, 2 * TILE * tiles - side) for tiles, side in zip((H, W), plane_HW.shape, strict=True)]
    return jnp.pad(plane_HW, pads).reshape(H, 2 * TILE, W, 2 * TILE).sum((0, 2))


@functools.lru_cache(maxsize=32)
def _resized_and_folded(size: int, new: int) -> np.ndarray:
    """The matrix that resizes `size` rows to `new` ones and folds those: float32 [2 TILE, size].

    Cubic convolution (Keys, 1981; a = -1/2), widened where there are fewer rows afterwards, as in `jax.image.resize`.
    """
    at = (np.arange(new) + 0.5) * size / new - 0.5
    x = np.abs(at[:, None] - np.arange(size)) / max(size / new, 1)
    near, far = ((1.5 * x - 2.5) * x) * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    weights /= weights.sum(1, keepdims=True)
    weights = np.pad(weights, ((0, -new % (2 * TILE)), (0, 0)))
    return np.float32(weights.reshape(-1, 2 * TILE, size).sum(0))


def _at(spectrum_YX, waves_N2):
    """What the spectrum of a folded plane has at waves given in whole or half periods to a tile: [N]."""
    y, x = (2 * waves_N2.T).astype(int)
    return spectrum_YX[y, x]  # negative periods count from the end, in NumPy's way and in Fourier's


@jax.jit
def _heard(folded_YX):
    """The mark's waves in a plane, with their weights: [N] complex64, [N] float32.

    What the frames themselves have at a wave is told by what they have half a period beside it, where no mark is.
    """
    waves_N2 = _waves()
    spectrum_YX = jnp.fft.fft2(folded_YX)
    seen_N = _at(spectrum_YX, waves_N2)
    beside = [(y, x) for y in (-0.5, 0, 0.5) for x in (-0.5, 0, 0.5) if (y, x) != (0, 0)]
    others_8N = jnp.stack([_at(spectrum_YX, waves_N2 + np.array(step)) for step in beside])
    noise_N = jnp.mean(jnp.abs(others_8N) ** 2, 0) + 1e-6 * jnp.mean(jnp.abs(seen_N) ** 2) + 1e-9
    size_N = jnp.abs(seen_N)
    weight_N = size_N / noise_N
    weight_N = jnp.minimum(weight_N, 4 * jnp.median(weight_N))
    weight_N /= jnp.maximum(weight_N.max(), 1e-30)
    return seen_N / jnp.maximum(size_N, 1e-30) * weight_N, weight_N


@jax.jit
def _best(seen_N, words_2MW):
    """The best agreement of any payload at any shift, and the two halves of that payload."""
    shifts_S2 = np.stack(np.meshgrid(*[np.arange(TILE)] * 2, indexing="ij"), -1).reshape(-1, 2)
    total_S, chosen_2S = 0.0, []
    for half in range(2):
        turns_SM = np.exp(2j * np.pi / TILE * (shifts_S2 @ _waves()[half::2].T)).astype(np.complex64)
        moved_SM = turns_SM * seen_N[half::2]
        agreement_SW = moved_SM.real @ words_2MW[half].real - moved_SM.imag @ words_2MW[half].imag
        total_S += agreement_SW.max(1)
        chosen_2S.append(agreement_SW.argmax(1))
    shift = jnp.argmax(total_S)
    return total_S[shift], chosen_2S[0][shift], chosen_2S[1][shift]


def _log10_chance(agreement: float, weight_N: np.ndarray) -> float:
    """A bound on P(sum of w cos(U) >= agreement) with independent uniform phases U, as a power of ten.

    Chernoff: the least of exp(-l a) prod I0(l w) over l, with the Bessel function I0, the mean of exp(x cos U).
    """
    scale_L = np.geomspace(1e-2, 1e3, 120)
    x_LN = scale_L[:, None] * np.asarray(weight_N, np.float64)
    # I0 grows like exp(x): the bound on it beyond 50 is within a hundredth.
    large_LN = x_LN - 0.5 * np.log(2 * np.pi * np.maximum(x_LN, 1)) + 0.01
    log_i0_LN = np.where(x_LN < 50, np.log(np.i0(np.minimum(x_LN, 50))), large_LN)
    return min(0.0, np.min(log_i0_LN.sum(1) - scale_L * agreement).item()) / math.log(10)
