"""The inputs of a case, from its description: a dictionary of plain values, and a seed.

Names within the streams are those under which the arrays were made, so that they are the same inputs.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import numpy as np

from .draw import Array, F, bf16_bits, from_bf16, half_bits, integers, normal, permutation, words

Case = dict[str, Any]
QUIET_NEGATIVE_NAN = np.uint32(0xFFC00000)


def logits(c: Case, seed: int) -> Array:
    """fp32 [T, E], exact in the case's dtype.

    Kinds: normal; wide (sigmoid saturates); grid (many ties, both zeros); close (a few ulp apart); tiny
    (near 2^-125); bits (any bit pattern); inf (many infinities and zeros); special (those, NaN of both
    signs, subnormals, and rows of one value).
    """
    shape, kind, tag = (c["T"], c["E"]), c["kind"], (c["name"], "logits")
    x = normal(seed, tag, shape) * F(2)
    if kind == "wide":
        x = x * F(6)
    elif kind == "grid":
        x = np.round(x * F(2)) * F(0.5)
        zeros = np.where(integers(seed, (tag, "z"), shape, 2) == 1, F(0), F(-0.0))
        x = np.where(x == 0, zeros, x).astype(F)
    elif kind == "close":
        base = np.round(x[:, :1] * F(4)) * F(0.25)
        steps = integers(seed, (tag, "c"), shape, 64).astype(F) * F(2.0**-20)
        x = (base + F(1) + steps).astype(F)
    elif kind == "tiny":
        x = (x * F(2.0**-30) * F(2.0**-95)).astype(F)
    elif kind == "bits":
        drawn = words(seed, (tag, "b"), x.size) >> np.uint64(32)
        x = drawn.astype(np.uint32).view(F).reshape(shape)
    elif kind in ("special", "inf"):
        x = _with_specials(x, kind, tag, seed)
    x = np.ascontiguousarray(x, F)
    return from_bf16(bf16_bits(x)) if c["bf16"] else x


def _with_specials(x: Array, kind: str, tag: Any, seed: int) -> Array:
    inf, nan = np.inf, np.nan
    if kind == "inf":
        pool = np.array([-inf, -inf, -inf, 0.0, -0.0, 88.0, -120.0], F).view(np.uint32)
    else:
        positive = [1e-40, -1e-40, 3e38, -3e38, 17.5, 40.0, -17.5, -40.0, -100.0]
        pool = np.array([inf, -inf, nan, -0.0, 0.0, *positive], F).view(np.uint32)
        pool = np.append(pool, QUIET_NEGATIVE_NAN)
    share = integers(seed, (tag, "r"), (x.shape[0], 1), 4) * 20 + 4
    chosen = integers(seed, (tag, "w"), x.shape, 100) < share
    picked = pool[integers(seed, (tag, "p"), x.shape, len(pool))]
    bits = np.where(chosen, picked, np.ascontiguousarray(x, F).view(np.uint32))
    if kind == "special":
        whole = {3: nan, 5: -inf, 7: 1.5, 11: inf}
        row = np.arange(x.shape[0]) % 16
        for place, value in whole.items():
            bits[row == place] = np.array(value, F).view(np.uint32)
        bits[row == 9] = QUIET_NEGATIVE_NAN
    return bits.astype(np.uint32).view(F)


def routing_bias(c: Case, seed: int) -> Array | None:
    """fp32 [E], exact in the bias' dtype; "mask" and "inf" have -inf in them."""
    kind = c.get("bias")
    if not kind:
        return None
    experts = c["E"]
    x = normal(seed, (c["name"], "bias"), (experts,)) * F(0.5)
    if "zero" in kind:
        x = x * F(0)
    if "big" in kind:
        x = x * F(64)
    if "inf" in kind:
        hidden = integers(seed, (c["name"], "bi"), (experts,), 4) == 0
        x = np.where(hidden, F(-np.inf), x).astype(F)
    if "mask" in kind:
        x = np.where(np.arange(experts) < c["K"] + 1, x, F(-np.inf)).astype(F)
    return from_bf16(bf16_bits(x)) if kind.startswith("bf16") else np.ascontiguousarray(x, F)


def finalize(c: Case, seed: int) -> tuple[Array, Array, Array]:
    """(bits of the rows uint16 [P, padded H], weights fp32 [T, K], row of each slot int32 [T, K]).

    Kinds: normal; holes (slots of no row, -1); special (infinities, NaN, subnormals in rows); tiny
    (products near 2^-126); cancel (large rows of both signs); weights (holes whose weights would show).
    """
    tokens, top_k, kind, name = c["T"], c["K"], c["kind"], c["name"]
    slots = tokens * top_k
    place = permutation(seed, (name, "perm"), slots).reshape(tokens, top_k)
    shape = slots + 7, c["Hpad"]
    x = normal(seed, (name, "rows"), shape) * F(3)
    w = np.abs(normal(seed, (name, "w"), (tokens, top_k))) * F(0.25)
    if kind in ("holes", "weights"):
        place[integers(seed, (name, "h"), (slots,), 3).reshape(place.shape) == 0] = -1
    if kind == "special":
        inf = np.inf
        pool = np.array([inf, -inf, np.nan, 0.0, -0.0, 3.3e38, -3.3e38, 1e-40, -1e-40], F)
        chosen = integers(seed, (name, "s"), shape, 40) == 0
        x = np.where(chosen, pool[integers(seed, (name, "p"), shape, len(pool))], x).astype(F)
    if kind == "tiny":
        x = (x * F(2.0**-62) * F(2.0**-62)).astype(F)
        w = (w * F(2.0**-3)).astype(F)
    if kind == "cancel":
        x = np.where(integers(seed, (name, "sg"), shape, 2) == 0, x, -x).astype(F) * F(1024)
        x[:, ::2] = np.round(x[:, ::2])
    if kind == "weights":
        slot = np.arange(slots).reshape(place.shape)
        wrong = np.array([np.nan, np.inf, -np.inf, 1e30], F)[slot % 4]
        w = np.where(place == -1, wrong, np.where(slot % 5 == 0, -w, w)).astype(F)
    if c["wbf16"]:
        w = from_bf16(bf16_bits(w))
    return half_bits(x, c["elt"]), np.ascontiguousarray(w, F), place


def kept_tokens(c: Case) -> Array:
    """Which tokens of a finalize the file has."""
    tokens = c["T"]
    if not c["keep"]:
        return np.arange(tokens)
    return np.unique(np.linspace(0, tokens - 1, c["keep"]).astype(int))


def matrix(c: Case, shape: tuple[int, int], seed: int) -> Array:
    """The bits of a quantizer's input: uint16 of bf16 and fp16, uint8 of e4m3.

    Kinds: normal; heavy (magnitudes over 2^16); grid (codes and ties of e2m1); sparse; bits (any finite
    pattern); edge (blocks of infinities, NaN, zeros and subnormals).
    """
    name, dtype, kind = c["name"], c["dt"], c["kind"]
    m, k = shape
    if dtype == "e4m3":
        if kind == "bits":
            return integers(seed, (name, "e"), shape, 256).astype(np.uint8)
        size = {"normal": 1, "heavy": 40, "tiny": 0.01}.get(kind, 1)
        return _e4m3_bits(normal(seed, (name, "x"), shape) * F(size))
    x = normal(seed, (name, "x"), shape)
    if kind == "heavy":
        x = np.ldexp(x, (integers(seed, (name, "h"), shape, 16) - 8).astype(int)).astype(F)
    elif kind == "grid":
        points = np.array([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6], F)
        sign = np.where(integers(seed, (name, "s"), shape, 2) == 0, F(1), F(-1))
        power = np.repeat(integers(seed, (name, "e"), (m, k // 16), 12), 16, axis=1) - 6
        picked = points[integers(seed, (name, "t"), shape, 15)]
        x = np.ldexp(picked * sign, power.astype(int)).astype(F)
    elif kind == "sparse":
        x = np.where(integers(seed, (name, "p"), shape, 20) == 0, x, F(0)).astype(F)
        x[::3] = 0
    elif kind == "bits":
        bits = (words(seed, (name, "b"), m * k) >> np.uint64(48)).astype(np.uint16).reshape(shape)
        exponent = np.uint16(0x7F80 if dtype == "bf16" else 0x7C00)
        return np.where((bits & exponent) == exponent, np.uint16(0), bits)
    elif kind == "edge":
        x = _edge(x, name, seed)
    return half_bits(x, dtype)


def _edge(x: Array, name: str, seed: int) -> Array:
    (m, k), inf = x.shape, np.inf
    finite = [0.0, -0.0, 1e-36, -1e-37, 2.0**-130, 3e38, 1e-10, 2.0**-126, 65000.0, 6e-8]
    pool = np.array([inf, -inf, np.nan, *finite], F)
    block = np.repeat(integers(seed, (name, "k"), (m, k // 16), 6), 16, axis=1)
    pick = pool[integers(seed, (name, "p"), x.shape, len(pool))]
    some = np.where(integers(seed, (name, "q"), x.shape, 8) == 0, pick, x)
    x = np.select(
        [block == 0, block == 1, block == 2, block == 3], [pick, F(0), some, x * F(2.0**-12)], x
    ).astype(F)
    x[m // 2] = np.nan
    x[m // 3] = F(-0.0)
    return x


def values(bits: Array, dtype: str) -> Array:
    """fp32 of the bits of a matrix."""
    if dtype == "bf16":
        return from_bf16(bits)
    if dtype == "fp16":
        return bits.view(np.float16).astype(F)
    magnitude = _E4M3.astype(F)[bits & 0x7F]
    return np.where(bits & 0x80, -magnitude, magnitude).astype(F)


def global_scale(c: Case, x: Array, seed: int) -> Array:
    """fp32 [1] or [M]: the scale that a case of the global-scale quantizer is given."""
    rows = c["M"]
    if c["gs"] == "special" and c["rowwise"]:
        pool = np.array([0.0, 1.0, np.inf, np.nan, 1e-40, 1e38, 2688.0, -3.0], F)
        return pool[np.arange(rows) % len(pool)].copy()
    fixed = {"one": 1, "big": 2688, "zero": 0, "inf": np.inf, "nan": np.nan, "sub": 1e-40}
    fixed["huge"] = 3e38
    if c["gs"] in fixed:
        return np.full(rows if c["rowwise"] else 1, fixed[c["gs"]], F)
    with np.errstate(all="ignore"):
        size = np.where(np.isfinite(x), np.abs(x), 0).astype(np.float64)
    most = size.max(1) if c["rowwise"] else size.max().reshape(1)
    encode = np.where(most > 0, 2688.0 / np.where(most > 0, most, 1), 1.0).clip(0, 3e38)
    return np.ascontiguousarray((1.0 / encode if c["inverse"] else encode).astype(F))


def row_index(c: Case, seed: int) -> Array:
    """int32 [M]: a permutation, with holes, or of the first half alone."""
    m, name = c["M"], c["name"]
    index = permutation(seed, (name, "ri"), m)
    if c["index"] == "holes":
        index[integers(seed, (name, "rh"), (m,), 3) == 0] = -1
    if c["index"] == "short":
        index[m // 2 :] = -1
    return index


def _e4m3_values() -> Array:
    """fp64 [128], by code."""

    def value(code: int) -> float:
        exponent, fraction = code >> 3, code & 7
        return fraction * 2.0**-9 if exponent == 0 else (8 + fraction) * 2.0 ** (exponent - 10)

    return np.array([np.nan if code == 127 else value(code) for code in range(128)])


_E4M3 = _e4m3_values()


def _e4m3_bits(x: Array) -> Array:
    """uint8 of fp32, to nearest even, saturating."""
    known, size = _E4M3[:127], np.abs(x).astype(np.float64)
    high = np.searchsorted(known, size, side="left").clip(0, 126)
    low = (high - 1).clip(0)
    below, above = size - known[low], known[high] - size
    code = np.where((below < above) | ((below == above) & (low % 2 == 0)), low, high)
    code = np.where(size >= 448, 126, code)
    return np.where(np.isnan(x), np.uint8(0x7F), (code | (np.signbit(x) << 7)).astype(np.uint8))
