"""The permitted outputs of the fused mixture of experts, and the first element that is not."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import torch

from ..cases.moe_case import MoECase
from ..kernels.flashinfer import trtllm
from ..reference.bounds.accumulation import ANY_ORDER, Accumulation
from ..reference.bounds.interval import Interval, unless
from ..reference.weights.layout import unshuffled_bias
from .explain import bits

PLACES = 10
"""The number of equal parts of an interval, for the histogram of outputs."""


def unequal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A mask of the elements whose bits differ, for two tensors of one shape and dtype."""
    return (
        (a.contiguous().view(torch.uint8) != b.contiguous().view(torch.uint8))
        .unflatten(-1, (-1, a.element_size()))
        .any(-1)
    )


@dataclass(frozen=True)
class Outside:
    """The elements of an output that are not permitted: their number, and the first."""

    count: int
    of: int
    what: str
    token: int
    column: int
    got: torch.Tensor  # one element, as are the others
    low: torch.Tensor
    high: torch.Tensor
    reference: torch.Tensor

    def __str__(self) -> str:
        return f"{self.count} of {self.of} {self.what}"

    def where(self) -> str:
        allowed = bits(self.low)
        if not torch.equal(self.low, self.high):
            allowed += f" to {bits(self.high)}"
        return (
            f"first at token {self.token}, column {self.column}: got {bits(self.got)}, "
            f"allowed {allowed}, reference {bits(self.reference)}"
        )


def may_drop_nan(backend: str) -> bool:
    """True if a backend's activation is FlashInfer's, in a kernel whose source is closed."""
    return backend.startswith("flashinfer")


def left_open(case: MoECase, backend: str) -> torch.Tensor | None:
    """[T], the tokens of which a backend's output depends on a race; None: none."""
    few = case.ids is not None and case.ids.shape[0] <= trtllm.MAY_DROP_EQUAL_IDS
    if backend != trtllm.NAME or case.ids is None or not few:
        return None
    ids = case.ids.sort(dim=1).values
    equal = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
    return equal.any(1) if equal.any() else None


class Allowed:
    """The permitted outputs [T, H] of a backend for a case, and the reference's output."""

    def __init__(
        self, case: MoECase, accumulation: Accumulation = ANY_ORDER, *, backend: str = "reference"
    ):
        self.case = case
        self.accumulation = accumulation
        self.expected = case.reference()
        drops_nan = may_drop_nan(backend)
        self.interval = None if case.exact else case.allowed(accumulation, drops_nan=drops_nan)
        if (tokens := left_open(case, backend)) is not None:
            interval = self.interval or Interval.point(self.expected)
            self.interval = unless(tokens[:, None], interval)

    @property
    def determined(self) -> float:
        """The share of elements for which one value alone is permitted."""
        if self.interval is None:
            return 1.0
        return self.interval.single.double().mean().item()

    def wrong(self, got: torch.Tensor) -> torch.Tensor:
        """A mask of the elements that are not permitted."""
        if self.interval is None:
            return unequal(got, self.expected)
        return ~self.interval.contains(got)

    def first(self, got: torch.Tensor) -> Outside | None:
        """The first element that is not permitted; None if all are."""
        bad = self.wrong(got)
        if not bad.any():
            return None
        token, column = (int(i) for i in bad.nonzero()[0])
        what = "elements are not the one right output"
        if self.interval is not None:
            what = f"elements are outside their intervals (sums: {self.accumulation.name})"
        interval = self.interval or Interval.point(self.expected)

        def of(t: torch.Tensor) -> torch.Tensor:
            return t[token, column].to(got.dtype)

        return Outside(
            int(bad.sum()),
            bad.numel(),
            what,
            token,
            column,
            of(got),
            of(interval.low),
            of(interval.high),
            of(self.expected),
        )

    def places(self, got: torch.Tensor) -> list[int]:
        """Count the elements in each tenth of their interval, where that holds more than one value."""
        if self.interval is None:
            return [0] * PLACES
        low, high = self.interval.low, self.interval.high
        wide = (high > low) & low.isfinite() & high.isfinite() & ~self.wrong(got)
        place = (got.double() - low)[wide] / (high - low)[wide]
        return (place * PLACES).long().clamp(0, PLACES - 1).bincount(minlength=PLACES).tolist()


def explain_output(case: MoECase, outside: Outside) -> list[str]:
    """The reference's values on the way to an element of the output: a line for each slot."""
    ids, weights = case.routed
    result = case.run(keep_steps=True)
    t, column, lines = outside.token, outside.column, []
    for k, e in enumerate(ids[t].tolist()):
        local = e - case.local_expert_offset
        if not 0 <= local < case.experts.num_local:
            lines.append(f"slot {k}: expert {e} is on another rank")
            continue
        text = (
            f"slot {k}: expert {e}, accumulator2 {bits(result.steps['accumulator2'][t, k, column])}"
        )
        if "fc2_input_token_scales" in result.steps:
            text += f" * token scale {bits(result.steps['fc2_input_token_scales'][t, k])}"
        if case.experts.gemm2_bias is not None:
            bias = unshuffled_bias(case.experts.gemm2_bias[local], False)[column]
            text += f" + bias {bits(bias)}"
        text += f", * output2_scale_scalar {bits(case.experts.output2_scale_scalar[local])}"
        text += f" = row {bits(result.rows[t, k, column])}, weight {bits(weights[t, k])}"
        lines.append(text)
    return [*lines, f"sum over the slots = {bits(result.output[t, column])}"]
