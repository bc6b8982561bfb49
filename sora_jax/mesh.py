"""The one place that knows the device mesh. Models name logical axes; the table below maps them to mesh axes.

    data     copies of the model, each with its share of the batch
    fsdp     shares of the batch, with parameters and optimizer state split among them
    context  the patches of one video: each device has a part of every frame; parameters are split among them too
    tensor   heads and feed-forward columns; in the codec more parts of every frame

On one device every axis has size 1 and all of this is the identity.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sora_jax.errors import InputError

AXES = ("data", "fsdp", "context", "tensor")

# Logical axis -> mesh axes. Axes without a name are never split.
RULES = {
    "batch": ("data", "fsdp"),
    "tokens": ("context",),  # of each frame
    "rows": ("context", "tensor"),  # of a picture, in the codec
    "heads": ("tensor",),
    "feed_forward": ("tensor",),
    # Of parameters at rest; see `gathered`.
    "width": ("fsdp", "context"),
    "codec_channels": ("fsdp", "context", "tensor"),
    "layers": (),  # one block after the other: see `nn.scan` in the models
}
_AT_REST = ("width", "codec_channels")
_IF_THEY_DIVIDE = ("codec_channels",)  # some of the codec's layers are tiny
_FILLED_UP = ("rows",)  # if they do not divide, the compiler gives the last device fewer, and masks what is missing


def make_mesh(data: int = -1, fsdp: int = 1, context: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over `devices` (default: all); `data=-1` takes what the other axes leave.

    Raises:
      InputError: the sizes do not multiply to the number of devices; it names some that would.
    """
    devices = np.asarray(jax.devices() if devices is None else devices)
    shape = tuple(whole_sizes(devices.size, data, fsdp, context, tensor).values())
    # Auto axes: the constraints below are hints to the compiler, which fills in the rest.
    return Mesh(_along_links(devices, shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _along_links(devices: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The devices in this shape; the chips of a TPU slice such that neighbours along an axis are neighbours there."""
    if all(hasattr(device, "coords") for device in devices.flat):
        sides = np.max([device.coords for device in devices.flat], axis=0) + 1
        if math.prod(sides) == devices.size:  # a whole slice, each chip one device
            return mesh_utils.create_device_mesh(shape, list(devices.flat), allow_split_physical_axes=True)
    return devices.reshape(shape)


def whole_sizes(devices: int, data: int = -1, fsdp: int = 1, context: int = 1, tensor: int = 1) -> dict[str, int]:
    """The sizes of a mesh of so many devices: `data=-1` is what the other axes leave.

    Raises:
      InputError: as `make_mesh` does.
    """
    rest = fsdp * context * tensor
    if data == -1 and rest > 0 and devices % rest == 0:
        data = devices // rest
    sizes = dict(zip(AXES, (data, fsdp, context, tensor), strict=True))
    check_mesh(sizes, devices)
    return sizes


def check_mesh(sizes: dict[str, int], devices: int) -> None:
    """Raises InputError if these sizes make no mesh of so many devices; it names some that would."""
    if min(sizes.values()) > 0 and math.prod(sizes.values()) == devices:
        return
    words = ",".join(f"{name}={size}" for name, size in sizes.items() if (name, size) != ("data", -1))
    would = f"sizes that can be: {', '.join(str(n) for n in range(1, devices + 1) if devices % n == 0)}"
    if min(sizes.values()) > 0:
        others = {name: math.prod(sizes.values()) // size for name, size in sizes.items()}
        fit = [f"{name}={devices // rest}" for name, rest in others.items() if devices % rest == 0]
        would = f"{' or '.join(fit)} would" if fit else would
    raise InputError(f"mesh {words} does not multiply to the {devices} devices; {would}")


def parse_mesh(text: str, devices=None) -> Mesh:
    """A mesh from words like "data=2,context=4"; an axis that is not named has size 1.

    Raises:
      InputError: an unknown axis, or sizes that do not multiply to the number of devices.
    """
    return make_mesh(**parse_sizes(text), devices=devices)


def parse_sizes(text: str) -> dict[str, int]:
    """The sizes of all axes from such words.

    Raises:
      InputError: an unknown axis, one that is named twice, or no number.
    """
    sizes = {}
    for word in text.split(","):
        name, _, size = word.strip().partition("=")
        if name in sizes:
            raise InputError(f"mesh {text!r}: {name} is there twice")
        if name not in AXES or not (size.isascii() and size.isdecimal()):
            raise InputError(f"mesh {text!r}: {word!r} is none of {', '.join(f'{axis}=N' for axis in AXES)}")
        sizes[name] = int(size)
    return {**dict.fromkeys(AXES, 1), **sizes}


def shardings(boxed: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a (possibly abstract) tree, from the axis names its parameters carry.

    The result has the structure of the unboxed tree. Optimizers put placeholders where they keep nothing for a
    parameter: those stay as they are.

    Raises:
      InputError: a parameter that the mesh cannot divide, or whose names the table does not place.
    """

    def place(path, leaf):
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, PartitionSpec())
        if not hasattr(leaf.value, "shape"):
            return leaf.value
        names = list(leaf.names)
        _placed(names)  # all of them are in the table
        for number, (name, size) in enumerate(zip(leaf.names, leaf.value.shape, strict=True)):
            shares = math.prod(mesh.shape[axis] for axis in RULES.get(name, ()))
            if size % shares and name in _IF_THEY_DIVIDE:
                names[number] = None
            elif size % shares:
                axes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in RULES[name] if mesh.shape[axis] > 1)
                where = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
                possible = [n for n in range(1, shares) if size % n == 0 and mesh.size % n == 0]
                raise InputError(
                    f"mesh {axes} cannot divide the {size} ({name}) of {where} {list(leaf.value.shape)}; "
                    f"sizes below {shares} that can: {', '.join(map(str, possible))}"
                )
        return NamedSharding(mesh, _placed(names))

    return jax.tree.map_with_path(place, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def placed(boxed: Any, mesh: Mesh) -> Any:
    """The abstract arrays of such a tree, unboxed, each with its sharding."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        shardings(boxed, mesh),
    )


def _placed(names: Sequence[str | None]) -> PartitionSpec:
    """Mesh axes by the names of an array's axes.

    Raises:
      InputError: a name that is not in the table, or two that share a mesh axis.
    """
    taken = {}
    for name in names:
        if name is not None and name not in RULES:
            raise InputError(f"logical axis {name!r} is not in the table of the mesh; there are {', '.join(RULES)}")
        for axis in RULES.get(name, ()):
            if axis in taken:
                raise InputError(f"{taken[axis]} and {name} of one array would both be split along {axis}")
            taken[axis] = name
    return PartitionSpec(*[RULES.get(name) or None for name in names])


def check_heads(heads: int, sizes: Mapping[str, int]) -> None:
    """Raises InputError if the mesh cannot divide the heads of attention, which no parameter has for an axis."""
    tensor = math.prod(sizes[axis] for axis in RULES["heads"])
    if heads % tensor:
        possible = [n for n in range(1, tensor) if heads % n == math.prod(sizes.values()) % n == 0]
        raise InputError(
            f"mesh tensor={tensor} cannot divide {heads} heads; sizes below that can: {', '.join(map(str, possible))}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def shares(axis: str) -> int:
    """Into how many parts the mesh that is set splits a logical axis; 1 without a mesh."""
    return math.prod(jax.sharding.get_abstract_mesh().shape.get(name, 1) for name in RULES[axis])


def spec(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> PartitionSpec:
    """Where the parts of an array go, by the logical names of its axes; what does not divide stays whole."""
    _placed(axes)  # whether or not they divide
    return _placed(
        [name if name and size % shares(name) == 0 else None for size, name in zip(shape, axes, strict=True)]
    )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Hints at the placement of an activation, by logical axis names; the identity without a mesh.

    What does not divide stays whole, but for rows, of which the last devices have fewer or none.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    filled = [
        -(-size // shares(name)) * shares(name) if name in _FILLED_UP and size >= shares(name) else size
        for size, name in zip(x.shape, axes, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, spec(tuple(filled), axes))


def gathered(parameter: jax.Array, *axes: str | None) -> jax.Array:
    """A parameter as its layer uses it: what is split only at rest is whole, for as long as that takes."""
    return constrain(parameter, *[None if axis in _AT_REST else axis for axis in axes])


def per_device(function: Callable, axes: tuple[tuple[str | None, ...], ...], *arrays: jax.Array) -> jax.Array:
    """`function` of each device's part of the arrays, whose axes have these logical names.

    The result has shape and placement of the first array. Without a mesh, or on one device, all parts are whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*arrays)
    specs = tuple(spec(array.shape, names) for array, names in zip(arrays, axes, strict=True))
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)
