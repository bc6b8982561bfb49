"""Layers that text encoder, image encoder and transformer share. Their parameters carry logical axis names."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sora_jax.mesh import gathered

Initializer = Callable[..., jax.Array]


def check_sizes(config: Any, *names: str) -> None:
    """Raises ValueError unless these fields of a config, or the entries of tuples, are whole numbers of at least 1."""
    for name in names:
        value = getattr(config, name)
        if not all(type(one) is int and one >= 1 for one in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{name} is {value}; it must be whole, at least 1")


class Dense(nn.Module):
    """x @ kernel + bias: (..., in) -> (..., features), computed in `dtype`.

    Attributes:
      features: of the output.
      axes: logical names of the kernel's two axes.
      init: of the kernel; the bias starts at zero.
      use_bias: whether there is one.
      precision: of the product; by default TPUs and GPUs round float32 to 8 or 10 bits for it.
    """

    features: int
    axes: tuple[str | None, str | None]
    dtype: Any = jnp.float32
    init: Initializer = nn.initializers.xavier_uniform()
    use_bias: bool = True
    precision: jax.lax.PrecisionLike = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(self.init, self.axes)
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        shape = x.shape
        if x.ndim == 3:
            # One flat product: of a batch of short ones the TPU compiler would transpose the weights of all layers.
            x = x.reshape(-1, shape[-1])
        y = jnp.matmul(x.astype(self.dtype), gathered(kernel.astype(self.dtype), *self.axes), precision=self.precision)
        y = y.reshape(*shape[:-1], -1)
        if self.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[-1:])
            y += gathered(self.param("bias", init, (self.features,)).astype(self.dtype), *self.axes[-1:])
        return y


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, whose logical name is `axis`; computed in float32."""

    epsilon: float = 1e-6
    axis: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, (self.axis,)), (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon) * scale).astype(x.dtype)


def layer_norm(x: jax.Array, epsilon: float) -> jax.Array:
    """Zero mean and unit variance over the last axis, float32, nothing learned."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)


class LayerNorm(nn.Module):
    """The layer norm with a learned scale and bias; float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def parameter(name, init):
            return self.param(name, nn.with_logical_partitioning(init, (None,)), (x.shape[-1],))

        scale, bias = parameter("scale", nn.initializers.ones), parameter("bias", nn.initializers.zeros)
        return layer_norm(x, self.epsilon) * scale + bias
