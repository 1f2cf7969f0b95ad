"""Measure configurations of the grouped GEMMs, for `autotune_fused_moe`.

Each GEMM runs alone, in its candidates; one whose rows are not those of the table's choice is dropped.
`bn` is the permutation's tile, and so the two are chosen together: the `bn` whose fastest pair takes
the least time. Whole calls of that pair and of the table's then decide between them.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from triton.errors import TritonError

from ...tiles import GemmConfig
from ..call import KernelCall
from ..hopper.config import CONFIGS, RingConfig
from ..tile_table import Config, Configs, gemm_config
from . import cache
from .workload import Trial, microseconds

Timer = Callable[[functools.partial], float]
"""Microseconds of a call, whose last argument is the configuration, or the two of a whole call."""
TOLERANCE = 2**-7
"""The largest relative difference of a row whose sums are taken in another order. A sum may then round
to the next bf16, and one sum may be most of the row. Equal orders give equal bits."""
_log = logging.getLogger("nvfp4_moe")


@dataclass(frozen=True)
class Measured:
    """One candidate of the first or the second GEMM, run alone."""

    gemm: int
    config: Config
    us: float | None  # None: dropped
    dropped: str = ""  # why


@dataclass(frozen=True)
class Tuning:
    """The measurements at one number of tokens, as `print` shows them; both times are of whole calls."""

    tokens: int
    table: Configs
    table_us: float
    chosen: Configs
    chosen_us: float
    measured: tuple[Measured, ...]
    file: Path | None  # None: it could not be written, and lasts as long as the process

    def __str__(self) -> str:
        times = f"{self.table_us:.1f} us by the table, {self.chosen_us:.1f} us chosen"
        lines = [f"{self.tokens} tokens: {times}"]
        for gemm, (table, chosen) in enumerate(zip(self.table, self.chosen, strict=True), 1):
            lines.append(f"  GEMM {gemm}: {chosen}{', as the table' if chosen == table else ''}")
            ours = [m for m in self.measured if m.gemm == gemm]
            lines += [
                f"{m.us:12.1f} {m.config}"
                if m.us is not None
                else f"{'-':>12} {m.config}: {m.dropped}"
                for m in sorted(ours, key=lambda m: (m.us is None, m.us))
            ]
        return "\n".join(lines)


def autotune(
    call: KernelCall, tokens: Iterable[int], top_k: int, timer: Timer = microseconds
) -> list[Tuning]:
    """`autotune_fused_moe` of checked arguments: one result a bucket, at its largest count given.

    Args:
        call: whose layer is measured, with hidden states of its own.
    """
    buckets = {triton.next_power_of_2(t * top_k): t for t in sorted(tokens)}
    trial = functools.partial(Trial, call, top_k)
    return [
        # The kernels work differently on tiles at most half full; the skewed tokens fill them.
        _tune(trial(t), trial(slots // top_k, skewed=True), timer)
        for slots, t in buckets.items()
    ]


def _tune(timed: Trial, skewed: Trial, timer: Timer) -> Tuning:
    measured = [m for gemm in (1, 2) for m in _measure(gemm, timed, skewed, timer)]
    chosen = _fastest(measured) or timed.table
    table_us = us = timer(functools.partial(timed.call, timed.table))
    if chosen != timed.table:
        us = timer(functools.partial(timed.call, chosen))
        if us >= table_us:
            chosen, us = timed.table, table_us
    file = cache.store(timed.key, chosen)
    return Tuning(timed.tokens, timed.table, table_us, chosen, us, tuple(measured), file)


def _measure(gemm: int, timed: Trial, skewed: Trial, timer: Timer) -> list[Measured]:
    table, weights = timed.table[gemm - 1], timed.key.weights[gemm - 1]
    want = {trial: trial.gemm(gemm, table) for trial in (timed, skewed)}
    found = []
    for config in candidates(table, *weights, native=timed.key.native):
        same_order = _order(config) == _order(table)
        us, dropped = None, ""
        try:
            for trial, rows in want.items():
                torch.full_like(rows, torch.nan)  # freed at once: what is not written shows
                got = trial.gemm(gemm, config)
                dropped = dropped or difference(got[: trial.rows], rows[: trial.rows], same_order)
            if dropped:
                _log.warning("dropped %s in GEMM %d: %s", config, gemm, dropped)
            else:
                us = timer(functools.partial(timed.gemm, gemm, config))
        except (TritonError, RuntimeError) as error:  # mostly too large for a multiprocessor
            dropped = str(error).partition("\n")[0] or type(error).__name__
            _log.info("dropped %s in GEMM %d: %s", config, gemm, dropped)
        found.append(Measured(gemm, config, us, dropped))
    return found


def candidates(table: Config, rows: int, columns: int, *, native: bool) -> list[Config]:
    """Return the table's choice, its neighbours in `bn` and one more field, and other loads' choices."""
    if isinstance(table, RingConfig):
        return list(dict.fromkeys((table, *CONFIGS)))
    others = [gemm_config(each, 1, columns, native=native) for each in (1, 17, 65, 1024)]
    found = [table]
    for bn in (table.bn // 2, table.bn, table.bn * 2):
        c = replace(table, bm=math.gcd(table.bm, rows), bn=bn)  # which is what runs
        found += [
            c,
            *(other for other in others if other.bn == bn),
            replace(c, bm=c.bm * 2),
            replace(c, bm=c.bm // 2),
            replace(c, bk=c.bk * 2),
            replace(c, bk=c.bk // 2),
            replace(c, stages=c.stages + 1),
            replace(c, stages=c.stages - 1),
            replace(c, warps=12 - c.warps),  # 4 or 8
            replace(c, registers=None if c.registers else 128),
        ]
    return [c for c in dict.fromkeys(found) if c == table or _fits(c, rows, columns, native)]


def _order(c: Config) -> tuple[int, bool] | None:
    """Return all but K that the order of a sum depends on."""
    return None if isinstance(c, RingConfig) else (c.bk, c.decoded)


def _fits(c: GemmConfig, rows: int, columns: int, native: bool) -> bool:
    return (
        cache.refusal(c, columns, native=native) is None
        and c.bm >= 64  # what Hopper's warpgroups multiply
        and rows % c.bm == 0
        and c.bn <= 128
        and c.bm * c.bn <= 128 * 32 * c.warps  # a thread holds 128 sums at most
    )


def difference(got: torch.Tensor, want: torch.Tensor, same_order: bool) -> str:
    """Say how rows differ by more than the order of their sums explains; "" if they do not."""
    worst = 0.0
    for a, b in zip(got.split(4096), want.split(4096), strict=True):
        if not torch.equal(a, b):
            a, b = a.double(), b.double()
            error = (a - b).norm(dim=1) / b.norm(dim=1).clamp(min=1e-30)
            worst = max(worst, error.nan_to_num(torch.inf).max().item())
    allowed = 0.0 if same_order else TOLERANCE
    return f"a row differs by {worst:.1e} of its norm" if worst > allowed else ""


def _fastest(measured: list[Measured]) -> Configs | None:
    """Return the fastest two of one `bn`."""
    best: dict[tuple[int, int], tuple[float, Config]] = {}
    for m in measured:
        place = m.gemm, m.config.bn
        if m.us is not None and (place not in best or m.us < best[place][0]):
            best[place] = m.us, m.config
    pairs = [(best[1, bn], best[2, bn]) for gemm, bn in best if gemm == 1 and (2, bn) in best]
    if not pairs:
        return None
    (_, first), (_, second) = min(pairs, key=lambda pair: pair[0][0] + pair[1][0])
    return first, second
