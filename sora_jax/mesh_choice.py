"""Which meshes make sense for a model on so many devices."""

import math
from collections.abc import Iterator

from sora_jax.dit import DiTConfig
from sora_jax.errors import InputError
from sora_jax.model_config import ModelConfig
from sora_jax.text import TextConfig
from sora_jax.vision import VisionConfig


def generating_mesh(
    config: ModelConfig,
    size: tuple[int, int],
    number: int,
    is_guided: bool | None = None,
    rings: bool = True,
) -> tuple[str, str]:
    """A mesh for generating one video on `number` chips, and why this one.

    Args:
        is_guided: by default as the model is.
        rings: whether ring attention is as good as any; cuDNN's kernel does none.
    """
    is_guided = config.sampling.is_guided if is_guided is None else is_guided
    tokens = config.tokens(1, size)
    # Before the branches of guidance, of which the codec knows nothing: its rows are split along context and tensor.
    context = max(n for n in _divisors(number) if _divides(config, n, tokens))
    if is_guided and not rings and context % 2 == 0 and config.dit.heads % context:
        context //= 2
    branches = 2 if is_guided and number // context % 2 == 0 else 1
    tensor = max(n for n in _divisors(number // context // branches) if _splits(config, n))
    data = number // context // tensor
    if number == 1:
        return "data=1,context=1,tensor=1", "one device"
    reason = f"context={context} divides the {tokens} tokens of a frame and every width"
    if context > 1:
        group = math.gcd(context, config.dit.heads // tensor)
        reason += f", all-to-all among {group}" + (f", rings of {context // group}" if group < context else "")
    if branches > 1:
        reason += "; data has a branch of guidance on each half"
    if tensor > 1:
        reason += f"; tensor={tensor} takes what is left, dividing heads and feed-forward widths"
    if data > branches:
        reason += f"; data={data} makes {data // branches} videos in the time of one"
    return f"data={data},context={context},tensor={tensor}", reason


def generating_meshes(config: ModelConfig, size: tuple[int, int], number: int, batch: int = 1) -> list[str]:
    """Meshes that make sense for so many videos: they and the two branches of guidance, if any, along `data`."""
    branches = 2 if config.sampling.is_guided else 1
    tokens = config.tokens(1, size)
    return [
        f"data={data},context={context},tensor={tensor}"
        for data, tensor, context in _factors(number)
        if data <= branches * batch and _splits(config, tensor) and _divides(config, context, tokens)
    ]


def training_mesh(
    batch: int, number: int, *trained: DiTConfig | TextConfig, tokens: int | None = None
) -> tuple[str, str]:
    """A mesh for training these parts of a model, or whatever has no width, on `number` chips, and why this one.

    Args:
        tokens: of a latent frame, where that is known (see `ModelConfig.tokens`).

    Raises:
        InputError: no mesh divides them, the tokens and the batch.
    """
    widths = [part.width for part in trained]
    split = [size for part in trained for size in (part.heads, part.feed_forward)]
    found = [
        (fsdp, context, tensor, data)
        for data in _divisors(number)
        for fsdp, context, tensor in _factors(number // data)
        if not any(width % (fsdp * context) for width in widths)
        and not any(size % tensor for size in split)
        and (tokens is None or tokens % context == 0)
    ]
    fit = [sizes for sizes in found if batch % (sizes[3] * sizes[0]) == 0]
    if not fit:
        raise InputError(
            f"no mesh of {number} chips divides a batch of {batch} with widths of {', '.join(map(str, widths))}; "
            f"a batch of {min(data * fsdp for fsdp, _, _, data in found)} would do"
        )
    fsdp, context, tensor, data = max(fit)
    reason = f"fsdp={fsdp} divides the batch of {batch} and the parameters"
    if context > 1:
        reason += f", context={context} the patches or rows of each video"
    if tensor > 1:
        reason += f", tensor={tensor} heads and feed-forward widths"
    if data > 1:
        reason += f"; data={data} takes what is left, with copies of the parameters"
    return f"data={data},fsdp={fsdp},context={context},tensor={tensor}", reason


def training_meshes(config: ModelConfig, size: tuple[int, int], batch: int, number: int) -> list[str]:
    """Meshes that make sense for training the transformer: with as few copies of the parameters as there can be."""
    dit, tokens = config.dit, config.tokens(1, size)
    for data in _divisors(number):
        found = [
            f"data={data},fsdp={fsdp},context={context},tensor={tensor}"
            for fsdp, tensor, context in _factors(number // data)
            if not (batch % (data * fsdp) or tokens % context or dit.width % (fsdp * context))
            and not (dit.heads % tensor or dit.feed_forward % tensor)
        ]
        if found:
            return found
    return []


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _factors(number: int) -> Iterator[tuple[int, int, int]]:
    """All ways to write a number as a product of three."""
    for first in _divisors(number):
        for second in _divisors(number // first):
            yield first, second, number // first // second


def _divides(config: ModelConfig, shares: int, tokens: int) -> bool:
    return not (tokens % shares or any(part.width % shares for part in _transformers(config)))


def _splits(config: ModelConfig, shares: int) -> bool:
    return not any(part.heads % shares or part.feed_forward % shares for part in _transformers(config))


def _transformers(config: ModelConfig) -> list[DiTConfig | TextConfig | VisionConfig]:
    return [part for part in (config.dit, config.text, config.vision) if part is not None]
