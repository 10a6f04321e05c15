"""A mixing function instead of a random number generator: the same everywhere, and no state to keep."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def mix64(value: int) -> int:
    """64 bits from an integer by a step of SplitMix64 (Steele et al., 2014); neighbours give unrelated outputs."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
