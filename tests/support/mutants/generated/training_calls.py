"""Calls of the kernels of training: derivatives, row dots, decoded weights, empty groups."""

# SPDX-License-Identifier: Apache-2.0
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch

from nvfp4_moe import host
from nvfp4_moe.kernels.moe.training import empty_groups
from nvfp4_moe.kernels.moe.training.activation_gradient import activation_gradient
from nvfp4_moe.kernels.moe.training.row_dots import row_dots
from nvfp4_moe.kernels.weights.values import weight_values
from nvfp4_moe.reference.activation import IMPLEMENTED, ActivationType, activate
from nvfp4_moe.reference.bounds.interval import Interval, rounded
from nvfp4_moe.reference.layouts import from_linear
from nvfp4_moe.reference.quantize import dequantize
from nvfp4_moe.reference.recipe import BLOCK_SIZE, SfLayout

from ..calls import Answered, Call
from ..edge_calls import BELOW_NORMAL
from .far_calls import FAR, FarCall, behind, empty, some_bytes, some_values
from .gradients import gradient
from .numbers import seeded
from .part_calls import exactly

Tensor = torch.Tensor
_EXPERTS = 3
_ACCURACY, _CANCELLED = 2.0**-14, 2.0**-20
"""Errors of a result, and of a derivative's largest term, since two terms may cancel."""


@dataclass(frozen=True)
class GradientCall:
    """Arguments between 2^-40 and 2^70, zeros and NaN; with scales also every clamp's own limit.

    The scales are powers of two, so that the arguments are exact, and the limits are met.
    """

    kind: ActivationType
    scaled: bool
    columns: int = 72
    for_x_alone: bool = False  # scales of columns, and none of rows
    bound: float | None = None  # alpha and beta

    def _given(self) -> dict[str, Tensor | None]:
        g, n = seeded(int(self.kind)), 9
        parts = 2 if self.kind.gated else 1
        m = self.columns * parts
        expert = host.arange(n) * _EXPERTS // n
        sums = host.integers(g, -32, 33, (n, m)).float() / 8
        if not self.scaled:
            gate = sums[:, -self.columns :]
            gate *= host.powers(host.arange(-40, 32).repeat(self.columns // 72 + 1))[: self.columns]
            gate[0, ::3], gate[1, ::3], gate[2, ::9] = 0.0, -0.0, 2.0**70
            gate[3, ::9] = -(2.0**70)
        sums[4, 5], sums[5, -1] = torch.nan, torch.nan
        given: dict[str, Tensor | None] = dict.fromkeys(
            ("token_scale", "bias", "alpha", "beta", "clamp_limit", "column_scale", "row_scale")
        )
        given |= {"sums": sums.bfloat16() if self.scaled else sums, "expert": expert}
        given |= {
            "d": host.normal(g, n, self.columns).bfloat16(),
            "factor": host.uniform(g, n) + 0.5,
        }
        given["scale"] = host.powers(host.integers(g, -1, 2, (_EXPERTS, parts)))
        given["scale"][:, :1] *= 2.0 ** (parts - 1)  # another one of up
        if self.bound is not None:
            given["alpha"] = given["beta"] = host.full((_EXPERTS,), self.bound)
        if self.scaled:
            given["token_scale"] = host.powers(host.integers(g, -2, 2, (n,)))
            # Of an expert a row of memory, as a bias without padding is not.
            given["bias"] = (host.integers(g, -32, 33, (m, _EXPERTS)).float() / 8).mT
            values = {"alpha": [1.25, 0.75, 2.0], "beta": [0.75, -1.5, 2.0]}
            values["clamp_limit"] = [1.5, 0.5, 3.0]
            if self.kind == ActivationType.Situ:
                values["beta"] = [0.75, 1.5, 2.0]
            given |= {name: host.fp32(values[name]) for name in self.kind.parameters}
        if self.scaled or self.for_x_alone:
            given["column_scale"] = host.uniform(g, _EXPERTS, parts) + 0.5
        if self.scaled:
            given["row_scale"] = host.uniform(g, n) + 0.5
        return given

    def answer(self, device: str = "cpu") -> list[Tensor]:
        given = {n: None if t is None else t.to(device) for n, t in self._given().items()}
        parameters = tuple(given.pop(name) for name in ("alpha", "beta", "clamp_limit"))
        found = activation_gradient(**given, kind=self.kind, parameters=parameters)
        return [t.cpu() for t in found]

    def judge(self) -> Answered:
        given = {n: None if t is None else t.double() for n, t in self._given().items()}
        expert, scale = given["expert"].long(), given["scale"]

        def of_elements(t: Tensor | None) -> Tensor | float:
            """Return the scale [E, parts] of each element of raw."""
            return 1.0 if t is None else t[expert].repeat_interleave(self.columns, 1)

        def of_rows(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[:, None]

        raw = given["sums"]
        raw = raw if given["token_scale"] is None else raw * of_rows(given["token_scale"])
        raw = raw if given["bias"] is None else raw + given["bias"][expert]
        raw = (raw * of_elements(scale)).requires_grad_()
        names = ("alpha", "beta", "clamp_limit")
        parameters = {n: None if given[n] is None else given[n][expert, None] for n in names}
        y = activate(raw, self.kind, **parameters)
        d = given["d"] * of_rows(given["factor"])
        d_raw = gradient(y, d)
        y, raw = y.detach(), raw.detach()
        parts = raw.chunk(scale.shape[1], 1)
        # A derivative by gate has terms up to 1, times what multiplies the curve; one by up is a
        # product but for SiTU's, which has terms up to its curve.
        terms = [parts[0].abs() + 2 if len(parts) == 2 else torch.ones_like(raw)]
        if len(parts) == 2:
            terms.insert(0, host.full(d.shape, 2.0 * (self.kind == ActivationType.Situ)).double())
        error = _CANCELLED * torch.cat([term * d.abs() for term in terms], 1)
        # Of NaN a derivative may be 0, as torch's clamp has it.
        of_nan = torch.stack(parts).isnan().any(0)
        want = [(y, host.zeros(1), torch.zeros_like(of_nan))]
        for factor in (of_elements(given["column_scale"]), of_rows(given["row_scale"])):
            factor = 1.0 if factor is None else factor
            want.append((d_raw * factor, error * factor, of_nan.repeat(1, len(parts))))

        def accepts(got: list[Tensor]) -> bool:
            return all(_near(t, *right) for t, right in zip(got, want, strict=True))

        return Answered(accepts, lambda got: got[0].double(), y)


def _near(got: Tensor, want: Tensor, error: Tensor, anything: Tensor) -> bool:
    exact = Interval.point(want).widened(want.abs() * _ACCURACY + error + BELOW_NORMAL)
    return bool((anything | rounded(torch.bfloat16, exact).contains(got)).all())


@dataclass(frozen=True)
class RowDotsCall:
    """Rows wider than a program's block, whose products add up exactly in any order."""

    scaled: bool
    dtype: torch.dtype = torch.bfloat16
    columns: int = 1040

    def _given(self) -> dict[str, Tensor | None]:
        g, n, tokens = seeded(31), 7, 4
        given: dict[str, Tensor | None] = {
            "grad": host.integers(g, -3, 4, (tokens, self.columns)).to(self.dtype),
            "token": host.integers(g, 0, tokens, (n,)),
            "sums": host.integers(g, -63, 64, (n, self.columns)).bfloat16(),
            "row_scale": None,
            "bias": None,
            "scale": host.fp32([0.5, 1.0, 2.0]) * (1.0 if self.scaled else 11 / 8),
            "expert": host.arange(n) * _EXPERTS // n,
        }
        if self.scaled:
            given["row_scale"] = host.powers(host.integers(g, 0, 2, (n,)))
            given["bias"] = host.integers(g, -500, 501, (self.columns, _EXPERTS)).float().mT
        return given

    def answer(self, device: str = "cpu") -> Tensor:
        given = {n: None if t is None else t.to(device) for n, t in self._given().items()}
        return row_dots(**given).cpu()

    def judge(self) -> Answered:
        given = self._given()
        row, expert = given["sums"].float(), given["expert"]
        row = row if given["row_scale"] is None else row * given["row_scale"][:, None]
        row = row if given["bias"] is None else row + given["bias"][expert]
        row = (row * given["scale"][expert, None]).bfloat16()
        return exactly((row.double() * given["grad"][given["token"]].double()).sum(1).float())


@dataclass(frozen=True)
class WeightValuesCall:
    """Chosen rows, the last among them, no multiple of a program's; more blocks than a program has."""

    experts: int = 2
    wanted: int = 21
    k: int = 1088
    columns: int = 1040

    def _given(self) -> tuple[Tensor, Tensor, Tensor]:
        g, rows = seeded(32), 256
        codes = host.integers(g, 0, 256, (self.experts, rows, self.k // 2)).to(torch.uint8)
        scales = host.integers(g, 0, 127, (self.experts, rows, self.k // BLOCK_SIZE))
        places = torch.randperm(rows, generator=g, dtype=torch.int32, device="cpu")
        places[self.wanted - 1] = rows - 1
        return codes, scales.to(torch.uint8), places[: self.wanted]

    def answer(self, device: str = "cpu") -> Tensor:
        codes, scales, places = self._given()
        tiles = torch.stack([from_linear(one, SfLayout.layout_128x4) for one in scales])
        tiles = tiles.view(scales.shape).view(torch.float8_e4m3fn)
        given = (t.to(device) for t in (codes, tiles, places))
        return weight_values(*given, self.columns).cpu()

    def judge(self) -> Answered:
        codes, scales, places = self._given()
        of_experts = zip(codes, scales, strict=True)
        values = [dequantize(*one, 1.0)[places, : self.columns] for one in of_experts]
        return exactly(torch.stack(values).bfloat16())


@dataclass(frozen=True)
class EmptyGroupsCall:
    """Experts with rows and without, the first and the last among both."""

    ends: tuple[int, ...]
    size: tuple[int, int] = (3, 5)
    programs: int = 3
    dtype: torch.dtype = torch.bfloat16

    def answer(self, device: str = "cpu") -> Tensor:
        t = torch.ones(len(self.ends), *self.size, dtype=self.dtype, device=device)
        ends = torch.tensor(self.ends, dtype=torch.int32, device=device)
        with mock.patch.object(empty_groups, "_PROGRAMS", self.programs):
            empty_groups.zero_empty_groups(t, ends)
        return t.cpu()

    def judge(self) -> Answered:
        filled = [e > b for e, b in zip(self.ends, (0, *self.ends), strict=False)]
        want = torch.tensor(filled, dtype=self.dtype, device="cpu")[:, None, None]
        return exactly(want.expand(-1, *self.size))


def _gradient_of(rows: int) -> list[Tensor]:
    """Return the last rows of the gradient of SwiGLU, of 64 columns."""
    sums, d = behind(some_values(2, 128), rows), behind(some_values(2, 64), rows)
    expert = empty(torch.int64, rows)
    factor = behind(host.ones(2), rows)
    kind, none = ActivationType.Swiglu, (None, None, None)
    before = sums, None, None, host.ones(1, 2), expert
    found = activation_gradient(*before, kind, none, d, factor, None, factor)
    return [t[-2:] for t in found]


def _dots_of(rows: int) -> Tensor:
    sums, index = behind(some_values(2, 64), rows), empty(torch.int64, rows)
    return row_dots(some_values(1, 64), index, sums, None, None, host.ones(1), index)[-2:]


def _weights_of(experts: int) -> Tensor:
    codes, scales = behind(some_bytes(1, 1, 128, 32), experts), some_bytes(2, 1, 128, 4)
    scales = behind(scales, experts).view(torch.float8_e4m3fn)
    return weight_values(codes, scales, host.arange(128).int(), 64)[-1:]


def _emptied(experts: int) -> Tensor:
    t, ends = behind(host.ones(2, 1, 4096), experts), empty(torch.int32, experts)
    ends[-1] = 1
    empty_groups.zero_empty_groups(t, ends)
    return t[-2:]


def named() -> Iterator[tuple[str, Callable[[], Call]]]:
    for kind in IMPLEMENTED:
        for scaled in (False, True):
            yield (
                f"gradient, {kind.name}, scaled {scaled}",
                functools.partial(GradientCall, kind, scaled),
            )
    for kind in (ActivationType.Silu, ActivationType.Swiglu):
        wide = functools.partial(GradientCall, kind, False, 1040, for_x_alone=True)
        yield f"gradient, {kind.name}, wide", wide
    situ = ActivationType.Situ
    yield "gradient, Situ, far bounds", lambda: GradientCall(situ, False, bound=2.0**40)
    yield "row dots", lambda: RowDotsCall(True)
    yield "row dots, plain", lambda: RowDotsCall(False, torch.float32)
    yield "weight values", WeightValuesCall
    yield "weight values, three experts", lambda: WeightValuesCall(3, 8, 64, 48)
    yield "weight values, one row more", lambda: WeightValuesCall(2, 17, 192, 192)
    for ends in ((0, 2, 2, 7, 9, 9), (2, 2, 3), (1, 1)):
        yield f"empty groups, {ends}", functools.partial(EmptyGroupsCall, ends)
    yield "empty groups, wide", lambda: EmptyGroupsCall((0, 4, 4), (130, 130), 2, torch.float32)
    yield "far, gradient", lambda: FarCall(_gradient_of, 2, FAR // 64 + 2, 2)
    yield "far, row dots", lambda: FarCall(_dots_of, 2, FAR // 64 + 2, 2)
    yield "far, weight values", lambda: FarCall(_weights_of, 1, FAR // 8192 + 1)
    yield "far, empty groups", lambda: FarCall(_emptied, 2, FAR // 4096 + 2, 2)
