"""What training carries from step to step, and one step of it."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
import optax.contrib
from ml_collections import ConfigDict

from sora_jax.errors import InputError

Params = Any
Loss = Callable[[Params, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint holds. The random key of a step is made from the seed and `step`, and batches
    are functions of `step`, so the step number is also the random state and the position in the data.
    """

    step: jax.Array
    params: Params
    ema: Params
    optimizer: optax.OptState


def learning_rate(config: ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up, constant, then linear decay to zero over the last `decay` share of the steps, or over those that
    warming up leaves.

    The constant middle lets a longer run go on from a shorter one's checkpoint (arXiv:2405.18392).
    """
    decay = max(min(int(config.decay * steps), steps - config.warmup), 1)
    parts = [
        optax.linear_schedule(0.0, config.learning_rate, max(config.warmup, 1)),
        optax.linear_schedule(config.learning_rate, 0.0, decay),
    ]
    return optax.join_schedules(parts, [max(steps - decay, config.warmup)])


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then `config.name`: "adamw" or "muon".

    Muon (Keller Jordan, 2024; arXiv:2502.16982 for the scaling that makes its updates as large as Adam's)
    orthogonalises the update of every kernel, so that directions of small variance, such as colour in mostly gray
    frames, are learned as fast as the others. What is no kernel is left to Adam. Weights decay only in kernels.

    Raises:
      InputError: another name.
    """
    rate = learning_rate(config, steps)
    if config.name == "muon":
        optimizer = optax.contrib.muon(
            rate,
            ns_steps=4,
            beta=config.b1,
            adam_b1=config.b1,
            adam_b2=config.b2,
            weight_decay=config.weight_decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_kernel_dimensions,
        )
    elif config.name == "adamw":
        optimizer = optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=_kernels)
    else:
        raise InputError(f"config.optimizer.name is {config.name!r}; it can be 'adamw' or 'muon'")
    return optax.chain(optax.clip_by_global_norm(config.clip), optimizer)


def _kernels(params: Params) -> Any:
    """Which of the parameters are kernels. Names tell: norms and biases that a scan has stacked have two axes, too."""

    def is_kernel(path, _):
        # Parameters may still be boxed with their axis names: the box is not part of the name.
        name = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)][-1]
        return name.endswith("kernel")

    return jax.tree_util.tree_map_with_path(is_kernel, params)


def _kernel_dimensions(params: Params) -> Any:
    """How Muon sees each kernel as a matrix; None for what is no kernel."""

    def dimensions(is_kernel, leaf):
        if not is_kernel:
            return None
        # (layers, in, out) are matrices stacked by a scan; (time, rows, columns, in, out) is one matrix.
        inputs = (1,) if leaf.ndim == 3 else tuple(range(leaf.ndim - 1))
        return optax.contrib.MuonDimensionNumbers(reduction_axis=inputs, output_axis=leaf.ndim - 1)

    return jax.tree.map(dimensions, _kernels(params), params)


def create(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; `params` may be boxed with axis names, which the whole state then carries."""
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


def make_step(loss: Loss, optimizer: optax.GradientTransformation, seed: int, ema_decay: float, state: TrainState):
    """The jitted step: (state, batch) -> (state, metrics), with the old state's memory reused.

    The new state lies where `state` does: a compiler that chose would choose otherwise, and compile the next step anew.
    """

    def step(state: TrainState, batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, batch, key)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        # A fixed decay would take thousands of steps to forget the initial weights.
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params)
        metrics = {"loss": value, "gradient_norm": optax.global_norm(gradients), **metrics}
        return TrainState(state.step + 1, params, ema, optimizer_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None))
