"""Statistics of quantization a second time, one element at a time; and what is asked on any device."""

# SPDX-License-Identifier: Apache-2.0
import math
from dataclasses import dataclass, field
from unittest.mock import patch

import moe_cases
import numpy as np
import scalar_model
import torch
from assertions import assert_bitwise
from moe_cases import Shape
from moe_triton_cases import coarse, to

import nvfp4_moe
from nvfp4_moe.kernels.moe import ops as moe_ops
from nvfp4_moe.kernels.moe.call import KernelCall
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.moe.activations import hidden_values
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe
from nvfp4_moe.reference.statistics.counts import BINS, COUNTS, QuantizationStatistics

FOUR = Recipe("fast", NVFP44Over6Config())


@dataclass
class Slow:
    """One expert's sums, in Python."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    histogram: list[int] = field(default_factory=lambda: [0] * BINS)
    signals: list[float] = field(default_factory=list)
    noises: list[float] = field(default_factory=list)
    maxima: list[float] = field(default_factory=list)


class _Kernel(scalar_model.Kernel):
    """Tells of each block's scale before e4m3, and of 4over6's choice."""

    def block(self, x, encode, row_amax):
        self.errors, highs = [], []
        real = scalar_model.to_e4m3

        def telling(high):
            highs.append(float(high))
            return real(high)

        with patch.object(scalar_model, "to_e4m3", telling):
            byte, codes = super().block(x, encode, row_amax)
        four = len(self.errors) == 2 and bool(self.errors[0] < self.errors[1])
        self.seen.append((byte, highs[0 if four else -1] if highs else 0.0, four))
        return byte, codes

    def error(self, *arguments):
        self.errors.append(super().error(*arguments))
        return self.errors[-1]


def slow(x, recipe, experts, num_experts, encode=None) -> list[Slow]:
    """Compute the sums of `quantization_statistics` by the scalar model; x is bf16 or fp16."""
    found = [Slow() for _ in range(num_experts)]
    kernel = _Kernel(recipe)
    for row, of in zip(x.float().numpy(), experts.reshape(len(x), -1).tolist(), strict=True):
        kernel.seen = []
        with np.errstate(all="ignore"):
            if encode is None:
                _, codes, decode = kernel.row(row, np.float32(recipe.base_scale_inv))
            else:
                _, codes = kernel.blocks(row, np.float32(encode))
                decode = np.float32(1) / np.float32(encode)
        for e in of:
            if 0 <= e < num_experts:
                _add(found[e], row, kernel.seen, codes, float(decode))
    return found


def _add(s: Slow, row, seen, codes, decode: float) -> None:
    values, decoded = [float(v) for v in row], []
    s.counts["rows"] += 1
    for b, (byte, high, four) in enumerate(seen):
        block = values[16 * b : 16 * b + 16]
        something = any(abs(v) > 0 for v in block)
        s.counts["blocks"] += 1
        s.counts["zero blocks"] += all(v == 0 for v in block)
        s.counts["underflowed"] += something and (byte == 0 or decode == 0)
        s.counts["saturated"] += high > 464
        s.counts["fours"] += four
        s.counts["nan scales"] += byte == 0x7F
        sf = float(scalar_model.from_e4m3(byte))
        decoded += [
            float(scalar_model.from_e2m1(code)) * sf * decode
            for code in codes[16 * b : 16 * b + 16]
        ]
    s.counts["nans"] += sum(map(math.isnan, values))
    s.counts["infinities"] += sum(map(math.isinf, values))
    if all(map(math.isfinite, values + decoded)):
        s.signals.append(math.fsum(v * v for v in values))
        s.noises.append(math.fsum((v - d) ** 2 for v, d in zip(values, decoded, strict=True)))
    else:
        s.counts["unmeasured rows"] += 1
    top = max((abs(v) for v in values if not math.isnan(v)), default=0.0)
    if 0 < top < math.inf:
        s.maxima.append(top)
        fraction, exponent = math.frexp(top)  # in [1/2, 1)
        place = 4 * (exponent - 1 + 16) + math.floor((2 * fraction - 1) * 4)
        s.histogram[min(max(place, 0), BINS - 1)] += 1


def assert_slow(got: QuantizationStatistics, want: list[Slow], what: str) -> None:
    got = to("cpu", got)
    for e, s in enumerate(want):
        name = f"{what}, expert {e}"
        assert dict(zip(COUNTS, got.counts[e].tolist(), strict=True)) == s.counts, name
        assert got.histogram[e].tolist() == s.histogram, name
        sums = torch.tensor([math.fsum(s.signals), math.fsum(s.noises)], dtype=torch.float64)
        torch.testing.assert_close(got.energies[e], sums, rtol=1e-12, atol=0, msg=name)
        ratios = [n / s for s, n in zip(s.signals, s.noises, strict=True) if s > 0]
        low = -math.inf
        extremes = [max(s.maxima, default=low), -min(s.maxima, default=math.inf)]
        assert got.extremes[e, :2].tolist() == extremes, name
        worst = torch.tensor(max(ratios, default=low), dtype=torch.float64)
        torch.testing.assert_close(got.extremes[e, 2], worst, rtol=1e-12, atol=0, msg=name)


def assert_same(a: QuantizationStatistics, b: QuantizationStatistics, what: str) -> None:
    """Counts and row maxima to the bit, energies to the order of their sums."""
    a, b = to("cpu", a), to("cpu", b)
    assert_bitwise(a.counts, b.counts, f"{what}: counts")
    assert_bitwise(a.histogram, b.histogram, f"{what}: histogram")
    assert_bitwise(a.extremes[:, :2], b.extremes[:, :2], f"{what}: row maxima")
    for x, y in ((a.energies, b.energies), (a.extremes[:, 2], b.extremes[:, 2])):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=0, msg=f"{what}: energies")


def exact_call(shape: Shape, kind=ActivationType.Relu2):
    """(x, experts, ids, weights) whose sums are exact, so that every backend has one intermediate."""
    case = coarse(shape, kind)
    scale = case.activations.per_token_scale[:, None]
    x = (hidden_values(case.activations) * scale).bfloat16()[:, : shape.hidden]
    return x, case.experts, case.ids, case.weights


def triton_sees_what_the_reference_sees(device):
    """Statistics of both backends, of ranks that hold some of the experts; and the same output."""
    for offset, local, recipe in ((0, 6, FOUR), (2, 3, Recipe()), (5, 1, Recipe("exact"))):
        shape = Shape(9, 144, 80, 6, 3, offset, local)
        x, experts, ids, weights = (to(device, t) for t in exact_call(shape))
        given = {"num_experts": 6, "local_expert_offset": offset}
        given |= {"nvfp4_4over6": recipe.four_over_six, "fast_math": recipe.math == "fast"}

        def call(backend, x=x, experts=experts, ids=ids, weights=weights, given=given, **more):
            return nvfp4_moe.fused_moe(x, experts, (ids, weights), backend=backend, **given, **more)

        output, got = call("triton", stats=True)
        assert_bitwise(output, call("triton"), f"{shape}: output")
        _, want = call("reference", stats=True)
        for name, part in got.parts().items():
            assert_same(part, want.parts()[name], f"{shape} {name}")
        assert got.intermediate.count("rows").sum() > 0


def static_scales_on_triton(device):
    """fp32 intermediates, encoded."""
    case = moe_cases.make(Shape(7, 128, 128, 4, 2), mode="static")
    x, experts, ids, weights = (
        to(device, t) for t in (case.x, case.experts, case.ids, case.weights)
    )

    def call(backend, **more):
        return nvfp4_moe.fused_moe(
            x, experts, (ids, weights), activation="static", backend=backend, **more
        )

    output, got = call("triton", stats=True)
    assert_bitwise(output, call("triton"), "output")
    _, want = call("reference", stats=True)
    assert_same(got.hidden_states, want.hidden_states, "hidden states")
    # The intermediates differ in the last bits of their sums.
    assert_bitwise(got.intermediate.count("rows"), want.intermediate.count("rows"), "rows")
    for figure in ("snr", "largest", "median"):
        a, b = (getattr(s.intermediate, figure)() for s in (got, want))
        torch.testing.assert_close(a, b, rtol=1e-2, atol=0)


def shown(implementation, case, device, **options):
    """(ids, intermediate, row of each slot) that an implementation shows an observer, on the CPU."""
    seen = []
    call = KernelCall(
        case.activations, case.experts, case.experts.num_local, finalize_order="slot", **options
    )
    implementation(
        *(to(device, t) for t in (call, case.ids, case.weights)),
        observe=lambda *tensors: seen.extend(tensors),
    )
    return [t if t is None else t.cpu() for t in seen]


def intermediates_are_the_same(device):
    """Row by row, in the place that the permutation says."""
    from nvfp4_moe.kernels.moe import launch

    for offset, local in ((0, 6), (2, 3)):
        case = coarse(Shape(9, 128, 128, 6, 3, offset, local), ActivationType.Relu2)
        options = {"local_expert_offset": offset}
        ids, rows, row_of_slot = shown(launch.fused_moe, case, device, **options)
        ids2, want, none = shown(moe_ops.reference, case, "cpu", **options)
        assert none is None and torch.equal(ids, ids2)
        here = row_of_slot >= 0
        assert torch.equal(here, (ids.flatten() >= offset) & (ids.flatten() < offset + local))
        assert_bitwise(rows[row_of_slot[here].long()], want[here], "intermediate")


ON_TRITON = [
    triton_sees_what_the_reference_sees,
    static_scales_on_triton,
    intermediates_are_the_same,
]
