"""How sure a measured proportion is."""

import math


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927); (0, 1) if nothing was asked."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959964
    p, spread = right / n, z * z / n
    center = (p + spread / 2) / (1 + spread)
    half = math.sqrt(p * (1 - p) * spread + spread**2 / 4) / (1 + spread)
    return max(center - half, 0.0), min(center + half, 1.0)
