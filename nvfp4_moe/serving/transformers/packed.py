"""The NVFP4 experts of a module: quantized at its first call, and again when its weights change.

They are quantized in place the second time, so that a CUDA graph over the module serves the new weights
at its next replay.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ...kernels.backends import UnsupportedError
from ...reference.weights.experts import Experts
from ...reference.weights.prepare import prepare_experts
from ..gate import Gate
from .module import check_weights, projections, read_gate, sources

ATTRIBUTE = "_nvfp4_moe"
"""The attribute of a module that holds its `Packed`; it is in no state dict."""


@dataclass
class Packed:
    """A module's experts, and which bits of its tensors they hold."""

    gate: Gate
    experts: Experts
    held: list[tuple[StorageWeakRef, int, int]] | None  # None: they were read from a checkpoint

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the module quantizes weights of its own, if it has any."""
        if self.held is None:
            return Packed, (self.gate, self.experts, None)
        return type(None), ()


def packed_of(module: Any) -> Packed:
    """Return the module's experts, which hold its present weights.

    Writes that torch counts (an optimizer's step, `copy_`, a new parameter) are seen. A write through
    `.data` is not: `prepare` quantizes after it. While `torch.compile` traces, the experts are taken as
    they are.

    Raises:
        UnsupportedError: the module is not modelled; or it is traced before its first call.
        TypeError, ValueError: its weights, as `prepare_experts` says.
    """
    packed: Packed | None = getattr(module, ATTRIBUTE, None)
    if torch.compiler.is_compiling():
        if packed is None:
            raise UnsupportedError(
                f"{type(module).__name__} is compiled before its weights are quantized: call "
                "nvfp4_moe.serving.transformers.prepare(model) first"
            )
        return packed
    if packed is None or not (packed.held is None or _same(packed.held, sources(module))):
        packed = quantize(module)
    return packed


@torch.no_grad()
def quantize(module: Any) -> Packed:
    """Quantize the module's weights now, whatever has been quantized before.

    Experts that were read from a checkpoint stay as they are: the module has no other weights.
    """
    before: Packed | None = getattr(module, ATTRIBUTE, None)
    if before is not None and before.held is None:
        return before
    held = [_identity(t) for t in sources(module)]
    gate = read_gate(module)
    check_weights(module)
    w13, w2, *biases = (None if t is None else _half(t) for t in projections(module))
    assert w13 is not None and w2 is not None
    options: dict[str, Any] = {"w13_bias": biases[0], "w2_bias": biases[1], **gate.parameters}
    if before is not None and before.gate == gate and _fits(before.experts, w13, w2):
        before.experts.load_(w13, w2, **options)
        before.held = held
        return before
    packed = Packed(gate, prepare_experts(w13, w2, gate.activation, **options), held)
    setattr(module, ATTRIBUTE, packed)
    return packed


def _half(t: torch.Tensor) -> torch.Tensor:
    """Contiguous, and rounded to bf16 where it is fp32, as `fake_quantized_moe` does."""
    return (t.bfloat16() if t.dtype == torch.float32 else t).contiguous()


def _fits(experts: Experts, w13: torch.Tensor, w2: torch.Tensor) -> bool:
    return experts.gemm1_weights.device == w13.device and (
        experts.num_local,
        experts.hidden_size,
        experts.intermediate_size,
    ) == (w13.shape[0], w13.shape[2], w2.shape[2])


def _identity(t: torch.Tensor) -> tuple[StorageWeakRef, int, int]:
    """Its storage (no other has its number while the reference is held), address and version."""
    return StorageWeakRef(t.untyped_storage()), t.data_ptr(), _version(t)


def _same(held: list[tuple[StorageWeakRef, int, int]], tensors: list[torch.Tensor]) -> bool:
    return all(
        storage.cdata == t.untyped_storage()._cdata
        and (address, version) == (t.data_ptr(), _version(t))
        for (storage, address, version), t in zip(held, tensors, strict=True)
    )


def _version(t: torch.Tensor) -> int:
    return 0 if t.is_inference() else t._version
