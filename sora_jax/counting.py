"""What a program costs, read off the program: operations where it is traced, traffic where it is compiled."""

import math
import re
from typing import Any

import jax.extend


def count_operations(jaxpr: Any, steps: int = 1) -> int:
    """Operations of the matrix products and convolutions of a traced program, two for each multiply-add.

    Loops count as often as they run, but for the outermost one of so many `steps`. Of the branches of a condition the
    costliest counts, of those for platforms the default, which is written as the operation is defined.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inside = list(jax.extend.core.jaxprs_in_params(params))
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * equation.outvars[0].aval.size * inner
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            # A dilated input is mostly zeros, which a good implementation skips.
            skipped = math.prod(params["lhs_dilation"])
            total += 2 * equation.outvars[0].aval.size * (kernel.size // features) // skipped
        elif name == "cond" and params.get("branches_platforms"):
            total += count_operations(inside[-1], steps)
        elif name == "cond":
            total += max(count_operations(branch, steps) for branch in inside)
        elif name == "scan" and steps > 1 and params["length"] == steps:
            total += sum(map(count_operations, inside))
        else:
            times = params["length"] if name == "scan" else 1
            total += times * sum(count_operations(one, steps) for one in inside)
    return total


_KINDS = ("all-gather", "all-to-all", "collective-permute", "all-reduce", "reduce-scatter")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}


def count_collectives(text: str, steps: int = 1, chips: int = 1) -> dict[str, float]:
    """Bytes that each chip receives in a program compiled for so many (HLO text), by kind of collective.

    Loops count as often as they run, but for the outermost one of so many `steps`. Of the branches of a condition the
    costliest counts.
    """
    bodies, entry, name = {}, None, None
    for line in text.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line):
            name = start[2]
            entry = name if start[1] else entry
            bodies[name] = []
        elif name and line.startswith("  "):
            bodies[name].append(line)

    def turns(condition: str) -> int:
        """Of a loop that counts from 0 up to a constant, as those of `scan` do."""
        constants = re.findall(r"= s32\[\]\S* constant\((\d+)\)", "\n".join(bodies[condition]))
        return max(map(int, constants), default=1)

    def count(name: str, steps: int) -> dict[str, float]:
        total = dict.fromkeys(_KINDS, 0.0)

        def add(other, times=1.0):
            for kind, size in other.items():
                total[kind] += times * size

        for line in bodies.get(name, ()):
            if found := re.search(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(", line):
                kind, received = found[2], _received(found[1], found[2], bool(found[3]), _group_size(line, chips))
                if name.startswith("all-reduce-scatter"):  # so the TPU's compiler calls what it fuses into one
                    kind, received = "reduce-scatter", received / 2
                total[kind] += received
            elif re.search(r" while\(", line):
                times = turns(re.search(r"condition=%?([\w.\-]+)", line)[1])
                is_steps = steps > 1 and times == steps
                add(count(re.search(r"body=%?([\w.\-]+)", line)[1], 1 if is_steps else steps), 1 if is_steps else times)
            elif re.search(r" conditional\(", line):
                branches = re.search(r"branch_computations=\{(.*?)\}", line)
                names = branches[1].split(",") if branches else re.findall(r"(?:true|false)_computation=([^,]+)", line)
                options = [count(name.strip().lstrip("%"), steps) for name in names]
                add(max(options, key=lambda option: sum(option.values())))
            else:
                for called in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", line):
                    add(count(called, steps))
        return total

    return {kind: size for kind, size in count(entry, steps).items() if size}


def _received(shapes: str, kind: str, is_start: bool, group: int) -> float:
    """Bytes a chip receives by one collective of that result among `group` chips: its own part is there already."""
    sizes = [
        _BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in re.findall(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]", shapes)
    ]
    if is_start and kind in ("all-gather", "collective-permute"):
        # The start of these gives operands, results, and sometimes counters.
        sizes = [size for size in sizes if size > 4]
        sizes = sizes[len(sizes) // 2 :]
    result, others = sum(sizes), (group - 1) / group
    return {
        "all-gather": result * others,
        "all-to-all": result * others,
        "collective-permute": result,
        "all-reduce": 2 * result * others,
        "reduce-scatter": result * (group - 1),
    }[kind]


def _group_size(line: str, chips: int) -> int:
    """Among how many chips a collective is; an empty list of groups means all."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    return chips
