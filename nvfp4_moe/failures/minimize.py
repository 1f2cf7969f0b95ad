"""Minimizes a tensor that fails, by a predicate alone, which may be slow: delta debugging.

First the rows, then the blocks of 16 columns: halves while one half fails, then those that can be zero
(Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", 2002: chunks are dropped,
large ones first), then the zeros' places. Then the values: zero, one, a power of two, fewer significant
bits, all at once and one by one. k slices that matter among n take about 4 k log2(n) calls.
"""

# SPDX-License-Identifier: Apache-2.0
import hashlib
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch

from ..reference.recipe import BLOCK_SIZE

A = TypeVar("A")
T = TypeVar("T")
Fails = Callable[[torch.Tensor], bool]
_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
"""Significand bits after the first."""


class Search(Generic[T]):
    """A predicate that counts its calls, remembers answers, and says no when time is short.

    Args:
        key: of a candidate; candidates of one key are asked about once. None: all are.
    """

    def __init__(
        self,
        fails: Callable[[T], bool],
        seconds: float,
        key: Callable[[T], Hashable] | None = None,
    ):
        self.calls = 0
        self.conditions: list[Callable[[T], bool]] = []  # of candidates that are asked about at all
        self._fails, self._key = fails, key
        self._end = time.monotonic() + seconds
        self._last = 0.0  # seconds of the latest call
        self._known: dict[Hashable, bool] = {}

    @property
    def exhausted(self) -> bool:
        """True if another call, as long as the latest, would end too late."""
        return time.monotonic() + self._last > self._end

    def __call__(self, candidate: T) -> bool:
        key = None if self._key is None else self._key(candidate)
        if key is not None and key in self._known:
            return self._known[key]
        if self.exhausted:
            return False
        start = time.monotonic()
        answer = all(c(candidate) for c in self.conditions) and bool(self._fails(candidate))
        self._last = time.monotonic() - start
        self.calls += 1
        if key is not None:
            self._known[key] = answer
        return answer

    def of(self, build: Callable[[A], T]) -> Callable[[A], bool]:
        """A predicate of parts: what `build` makes of it fails. When time is short nothing is built."""
        return lambda part: not self.exhausted and self(build(part))

    def begin(self, candidate: T) -> None:
        """Check that the original fails, whatever time is left.

        Raises:
            ValueError: it does not fail.
        """
        self._end, end = float("inf"), self._end
        if not self(candidate):
            raise ValueError("the case to minimize does not fail")
        self._end = end


def fewest(items: Sequence[T], fails: Callable[[list[T]], bool], minimum: int = 0) -> list[T]:
    """A part of the items that fails, without any one of which it does not; at least `minimum` of them.

    All of them must fail.
    """
    kept = list(items)
    size = (len(kept) + 1) // 2
    while size:
        before, start = len(kept), 0
        while start < len(kept):
            rest = kept[:start] + kept[start + size :]
            if len(rest) >= minimum and fails(rest):
                kept = rest
            else:
                start += size
        if size == 1 and len(kept) == before:
            break
        size = max(size // 2, 1)
    return kept


def smallest(upper: int, fails: Callable[[int], bool]) -> int:
    """The least number that fails, by bisection: `upper` does, and so does all above one that does."""
    low, high = 0, upper
    while low < high:
        midpoint = (low + high) // 2
        if fails(midpoint):
            high = midpoint
        else:
            low = midpoint + 1
    return high


def minimize_tensor(
    x: torch.Tensor, fails: Fails, seconds: float = 20.0, place: tuple[int, int] | None = None
) -> torch.Tensor:
    """The smallest and simplest tensor found for which `fails` holds, as it does for x.

    Args:
        x: [M, K] bf16, fp16 or fp32, K a multiple of 16; so is every tensor that `fails` is asked about.
        seconds: no call of `fails` is begun that would probably end later.
        place: row and block to look at first, those of a `compare.Difference`: spares calls.

    Raises:
        ValueError: x is no such tensor, or does not fail.
    """
    if x.dim() != 2 or x.dtype not in _BITS or x.shape[1] % BLOCK_SIZE or not x.numel():
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}; it must be bfloat16, float16 or float32 "
            f"[M, K], not empty, K a multiple of {BLOCK_SIZE}"
        )
    search = Search(fails, seconds, _key)
    search.begin(x)
    if place is not None:
        x = next((guess for guess in _guesses(x, *place) if search(guess)), x)
    while True:
        before = x
        x = _fewest_slices(x, 1, 0, search)
        x = _fewest_slices(x, BLOCK_SIZE, 1, search)
        x = _fewest_elements(x, search)
        x = _simpler_together(x, search)
        x = _simpler_apart(x, search)
        if search.exhausted or _key(x) == _key(before):
            return x


def _key(x: torch.Tensor) -> Hashable:
    data = x.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return tuple(x.shape), hashlib.blake2b(data, digest_size=16).digest()


def _guesses(x: torch.Tensor, row: int, block: int) -> list[torch.Tensor]:
    """The block alone, with the one that has the row's maximum, and the row."""
    line = x[row : row + 1]
    blocks = line.split(BLOCK_SIZE, 1)
    top = int(line.abs().nan_to_num(nan=0.0).argmax()) // BLOCK_SIZE
    pair = torch.cat([blocks[i] for i in sorted({block, top})], 1)
    return [blocks[block], pair, line]


def _bits(x: torch.Tensor) -> torch.Tensor:
    """The bit patterns as integers; -0 is not zero."""
    return x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16)


def _fewest_slices(x: torch.Tensor, size: int, dim: int, search: Search) -> torch.Tensor:
    """The fewest rows (dim 0, size 1) or blocks of columns (dim 1), as many of them zero as may be."""

    def join(selected: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(selected), dim)

    def keeping(of: list[int]) -> torch.Tensor:
        return join([part if i in of else zero for i, part in enumerate(parts)])

    def whole(of: list[list[torch.Tensor]]) -> torch.Tensor:
        return join([part for unit in of for part in unit])

    parts = list(x.split(size, dim))
    while len(parts) > 1:
        midpoint = (len(parts) + 1) // 2
        halves = (parts[:midpoint], parts[midpoint:])
        half = next((half for half in halves if search(join(half))), None)
        if half is None:
            break
        parts = half

    zero = torch.zeros_like(parts[0])
    present = [i for i, part in enumerate(parts) if _bits(part).any()]
    matter = fewest(present, search.of(keeping))
    # Runs of zeros are units from now on: where places matter, their lengths do.
    units: list[list[torch.Tensor]] = []
    previous = -1
    for i in [*matter, len(parts)]:
        if i > previous + 1:
            units.append([zero] * (i - previous - 1))
        if i < len(parts):
            units.append([parts[i]])
        previous = i

    dense = [unit for unit in units if unit[0] is not zero]
    if dense and search(whole(dense)):
        units = dense
    for i, unit in enumerate(units):
        if unit[0] is zero:

            def shorter(n: int, i: int = i) -> torch.Tensor:
                return whole([*units[:i], [zero] * (n + 1), *units[i + 1 :]])

            units[i] = [zero] * (smallest(len(unit) - 1, search.of(shorter)) + 1)
    return whole(fewest(units, search.of(whole), minimum=1))


def _fewest_elements(x: torch.Tensor, search: Search) -> torch.Tensor:
    """As many elements zero as may be."""

    def keeping(of: list[int]) -> torch.Tensor:
        kept = torch.zeros_like(x).flatten()
        kept[of] = x.flatten()[of]
        return kept.view(x.shape)

    present = _bits(x).flatten().nonzero().flatten().tolist()
    return keeping(fewest(present, search.of(keeping)))


def rounded_to_bits(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x rounded to so many significand bits after the first; what is not finite stays."""
    mantissa, exponent = torch.frexp(x.double())
    short = torch.ldexp((mantissa * 2.0 ** (bits + 1)).round(), exponent - bits - 1).to(x.dtype)
    return torch.where(x.isfinite() & short.isfinite(), short, x)


def _simpler_together(x: torch.Tensor, search: Search) -> torch.Tensor:
    """All elements one, or the largest near one and all with the fewest bits."""
    nonzero = _bits(x) != 0
    ones = torch.where(nonzero, torch.copysign(torch.ones_like(x), x), x)
    if search(ones):
        return ones
    finite = x.double().abs().masked_fill(~x.isfinite(), 0.0)
    exponent = torch.frexp(finite.max())[1] - 1
    near_one = torch.ldexp(x.double(), -exponent).to(x.dtype)
    if exponent != 0 and search(near_one):
        x = near_one
    return rounded_to_bits(x, smallest(_BITS[x.dtype], search.of(lambda n: rounded_to_bits(x, n))))


def _simpler_apart(x: torch.Tensor, search: Search) -> torch.Tensor:
    """Each element one, or a power of two, or near one, or of the fewest bits."""
    for i in _bits(x).flatten().nonzero().flatten().tolist():
        if search.exhausted:
            break
        x = _simpler_at(x, i, search)
    return x


def _simpler_at(x: torch.Tensor, i: int, search: Search) -> torch.Tensor:
    def with_value(value: torch.Tensor) -> torch.Tensor:
        changed = x.clone()
        changed.view(-1)[i] = value
        return changed

    fails = search.of(with_value)
    value = x.view(-1)[i]
    value = next((simple for simple in _simpler_values(value) if fails(simple)), value)
    if value.isfinite():
        short = [rounded_to_bits(value, n) for n in range(_BITS[x.dtype] + 1)]
        value = short[smallest(len(short) - 1, lambda n: fails(short[n]))]
    return with_value(value)


def _simpler_values(value: torch.Tensor) -> list[torch.Tensor]:
    """Simplest first; none for 1 itself."""
    if value == 1:
        return []
    one = torch.ones_like(value)
    simpler = [one] if value == -1 else [one, -one]
    if value.isfinite() and value != 0:
        near_one = (torch.frexp(value.double())[0] * 2).to(value.dtype)
        simpler += [c for c in (rounded_to_bits(value, 0), near_one) if c != value]
    return simpler
