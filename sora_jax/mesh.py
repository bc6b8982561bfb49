"""The one place that knows the device mesh. Models name logical axes; the table below maps them to mesh axes.

    data     copies of the model, each with its share of the batch
    fsdp     shares of the batch, with parameters and optimizer state split among them
    context  the patches of one video
    tensor   heads and feed-forward columns

On one device every axis has size 1 and all of this is the identity.
"""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sora_jax.errors import InputError

AXES = ("data", "fsdp", "context", "tensor")

# Logical axis -> mesh axes. An axis that is not listed is never split.
RULES = (
    ("batch", ("data", "fsdp")),
    ("tokens", "context"),
    ("width", "fsdp"),
    ("heads", "tensor"),
    ("feed_forward", "tensor"),
    ("codec_channels", "tensor"),
)


def make_mesh(data: int = -1, fsdp: int = 1, context: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over `devices` (default: all); `data=-1` takes what the other axes leave.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    rest = fsdp * context * tensor
    if data == -1 and rest > 0 and len(devices) % rest == 0:
        data = len(devices) // rest
    if data * rest != len(devices) or min(data, fsdp, context, tensor) < 1:
        sizes = ",".join(f"{name}={size}" for name, size in zip(AXES, (data, fsdp, context, tensor), strict=True))
        raise InputError(f"mesh {sizes} does not multiply to the {len(devices)} devices there are")
    # Auto axes: the constraints below are hints to the compiler, which fills in the rest.
    shape = (data, fsdp, context, tensor)
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shardings(boxed: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a (possibly abstract) tree, from the axis names its parameters carry.

    The result has the structure of the unboxed tree. Optimizers put placeholders where they keep nothing for a
    parameter: those stay as they are.
    """

    def place(leaf):
        names = ()
        if isinstance(leaf, nn.LogicallyPartitioned):
            if not hasattr(leaf.value, "shape"):
                return leaf.value
            names = leaf.names
        return NamedSharding(mesh, nn.logical_to_mesh_axes(names, RULES))

    return jax.tree.map(place, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Hints at the placement of an activation, by logical axis names; the identity without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, nn.logical_to_mesh_axes(axes, RULES))
