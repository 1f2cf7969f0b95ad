"""Numbers that are the same on every machine: Philox's raw 64-bit words, and single fp32 roundings.

A value's stream is named by a seed and by the CRC-32 of a tuple's `repr`. NumPy's own distributions
may change between its versions; its bit generators do not.
"""

# SPDX-License-Identifier: Apache-2.0
import math
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

F = np.float32
Array = NDArray[Any]


def words(seed: int, name: Any, count: int) -> Array:
    """`count` uint64."""
    if not count:
        return np.zeros(0, np.uint64)
    key = [seed, zlib.crc32(repr(name).encode())]
    return np.random.Philox(key=key).random_raw(count)


def integers(seed: int, name: Any, shape: tuple[int, ...], below: int) -> Array:
    """int64 from 0 to below - 1."""
    high = words(seed, (name,), math.prod(shape)) >> np.uint64(32)
    return (high * np.uint64(below) >> np.uint64(32)).astype(np.int64).reshape(shape)


def normal(seed: int, name: Any, shape: tuple[int, ...]) -> Array:
    """fp32, near normal, standard deviation 1.15: a sum of four uniforms, with a full significand."""
    count = math.prod(shape)
    drawn = words(seed, (name,), 2 * count)
    fours, last = drawn[:count], drawn[count:]
    parts = (((fours >> np.uint64(16 * i)) & np.uint64(0xFFFF)).astype(np.int64) for i in range(4))
    total = sum(parts) - 2 * 65535
    fraction = (last >> np.uint64(41)).astype(np.int64)
    scaled = total.astype(F) * F(2.0**-15) * (F(1) + fraction.astype(F) * F(2.0**-24))
    return scaled.reshape(shape)


def permutation(seed: int, name: Any, count: int) -> Array:
    """int32, each of 0 to count - 1 once."""
    return np.argsort(words(seed, name, count), kind="stable").astype(np.int32)


def bf16_bits(x: Array) -> Array:
    """uint16 of fp32, to nearest even; a NaN keeps its sign and becomes quiet."""
    bits = np.ascontiguousarray(x, F).view(np.uint32).astype(np.uint64)
    top = bits >> np.uint64(16)
    rounded = ((bits + 0x7FFF + (top & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, (top | np.uint64(0x40)).astype(np.uint16), rounded)


def from_bf16(bits: Array) -> Array:
    """fp32 of uint16."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(F)


def half_bits(x: Array, dtype: str) -> Array:
    """uint16 of fp32, as "bf16" or "fp16"."""
    if dtype == "bf16":
        return bf16_bits(x)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(x, F).astype(np.float16).view(np.uint16)
