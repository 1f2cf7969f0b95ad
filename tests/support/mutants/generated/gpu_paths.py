"""The quantizer's paths that only a GPU takes, in the interpreter, which has none of its instructions.

A path is chosen by ARCH; the operations on it are those of the interpreter, to the same bits.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

from nvfp4_moe.cases import inputs
from nvfp4_moe.cases import quantize as quantize_cases
from nvfp4_moe.kernels.quantize import block, kernel
from nvfp4_moe.reference.numerics import accumulate
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout

from ..calls import Answered, Call, QuantizerCall
from ..kernel_calls import rows_at_edges
from . import quantizer_probes

ARCH = 90
_OPERATIONS = (
    "add_magnitudes", "div", "flush", "fma", "mul", "rcp", "reciprocal", "smaller", "sub",
    "e2m1_encode", "e2m1_signs", "e4m3_encode", "e4m3_round", "magnitude_unit",
)  # fmt: skip
"""`quantize/block.py` calls these with ARCH as the last argument."""


@dataclass(frozen=True)
class QuantizerOfAGpuCall:
    """A call of a quantizer whose blocks take the paths of sm_90."""

    call: Call

    def answer(self, device: str = "cpu") -> Any:
        changes = {name: _interpreted(getattr(block, name)) for name in _OPERATIONS}
        encode = block.e2m1_encode_magnitudes
        changes["e2m1_encode_magnitudes"] = lambda a, _, *more: encode(a, 0, *more)
        with ExitStack() as stack:
            for name, new in changes.items():
                stack.enter_context(mock.patch.object(block, name, new))
            stack.enter_context(mock.patch.object(kernel, "quantize_block", _quantize_block))
            builder = interpreter.InterpreterBuilder
            stack.enter_context(mock.patch.object(builder, "create_fma", _fused))
            return self.call.answer(device)

    def judge(self) -> Answered:
        return self.call.judge()


def _interpreted(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Return an operation that does what it does without a GPU, whatever its last argument."""
    return lambda *args: operation(*args[:-1], 0)


def _quantize_block(*args: Any) -> Any:
    return block.quantize_block(*args[:-1], ARCH)


def _fused(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """Return x * y + z, rounded once, which the interpreter's own is not."""
    a, b, c = (torch.from_numpy(np.array(t.data)) for t in (x, y, z))
    return interpreter.TensorHandle(accumulate.fma(a, b, c).numpy(), z.dtype.scalar)


def named() -> Iterator[tuple[str, Callable[[], Call]]]:
    near = torch.cat([rows_at_edges(), inputs.synthetic("grid", 400, 80, seed=5)[100:250]])
    fast, exact = Recipe("fast", NVFP44Over6Config()), Recipe("exact", NVFP44Over6Config())
    for recipe in (
        fast,
        Recipe("exact", NVFP44Over6Config(256, "MSE")),
        Recipe("fast", NVFP44Over6Config(448, "MAE", True)),
    ):
        case = quantize_cases.Case("per-token", recipe, SfLayout.layout_linear)
        yield (
            f"interpreted, quantizer of a GPU, {recipe}",
            lambda case=case: QuantizerOfAGpuCall(QuantizerCall(near, case)),
        )
    others = dict(quantizer_probes.named())
    of_any_size = (f"quantizer, rows of any size at a time, {recipe}" for recipe in (fast, exact))
    more = (
        "quantizer, 4over6, tiny rows alone", "quantizer, 4over6 by MAE, per-token, tiny",
        "quantizer, 4over6 by MAE, global-scale, far", "quantizer, by row, 4over6",
    )  # fmt: skip
    equal = (f"quantizer, equal errors, {recipe}" for recipe in (fast, exact))
    for name in (*of_any_size, *equal, *more):
        yield (
            f"interpreted, {name}, of a GPU",
            lambda name=name: QuantizerOfAGpuCall(others[name]()),
        )
