"""A call of the Triton kernels: its answer, and the test of that answer."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol
from unittest import mock

import torch

from nvfp4_moe.cases import quantize as quantize_cases
from nvfp4_moe.cases.moe_case import MoECase
from nvfp4_moe.differential import quantizers
from nvfp4_moe.differential.compare import compare, run_reference
from nvfp4_moe.differential.verdict import Allowed
from nvfp4_moe.kernels.moe import launch
from nvfp4_moe.kernels.moe.backends import FUSED_MOE
from nvfp4_moe.kernels.moe.tile_table import Config
from nvfp4_moe.kernels.tiles import GemmConfig
from nvfp4_moe.reference.quantize import Quantized, dequantize

Tensor = torch.Tensor


@dataclass(frozen=True)
class Answered:
    """The answers that are allowed, and the values that the criteria of closeness compare."""

    accepts: Callable[[Any], bool]
    values: Callable[[Any], Tensor]  # fp64
    right: Tensor


@dataclass(frozen=True)
class FusedCall:
    """The fused mixture of experts, in few programs, by the paths that small layers take or others."""

    case: MoECase
    config: Config = GemmConfig(128, 16, 128, 1, 4)  # noqa: RUF009 (frozen); of both GEMMs
    limits: dict[str, Any] = field(default_factory=dict)  # in `kernels.moe`, by module and name

    def answer(self, device: str = "cpu") -> Tensor:
        with ExitStack() as stack:
            for name, value in self.limits.items():
                stack.enter_context(mock.patch(f"{launch.__package__}.{name}", value))
            both = (self.config, self.config)
            stack.enter_context(mock.patch.object(launch, "_configs", lambda *_: both))
            return FUSED_MOE.serve(self.case.to(device).request(), "triton")[0].cpu()

    def judge(self) -> Answered:
        """The intervals, or the one right output."""
        allowed = Allowed(self.case)
        expected = allowed.expected.double()
        return Answered(lambda got: not allowed.wrong(got).any(), torch.Tensor.double, expected)


@dataclass(frozen=True)
class QuantizerCall:
    x: Tensor
    case: quantize_cases.Case

    def answer(self, device: str = "cpu") -> Quantized:
        return quantizers.run("triton", self.x.to(device), self.case)

    def judge(self) -> Answered:
        """Every bit."""
        expected, x, case = run_reference(self.x, self.case), self.x, self.case

        def values(q: Quantized) -> Tensor:
            decode = q.per_token_scale
            if decode is None:
                decode = 1 / torch.as_tensor(case.scale(x), dtype=torch.float32, device="cpu")
            return dequantize(q.codes, q.block_scales, decode, case.layout).double()

        return Answered(
            lambda got: compare(x, case, got, expected) is None, values, values(expected)
        )


class Call(Protocol):
    """`answer`, on the CPU, of kernels in the interpreter or on a GPU; `judge` runs anywhere."""

    def answer(self, device: str = "cpu") -> Any: ...

    def judge(self) -> Answered: ...
