"""The experts functions that transformers calls, and their registration.

`fn(module, hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K])` returns [T, H]: transformers
5.17 and 5.24, `integrations/moe.py`, `ExpertsInterface`.
"""

# SPDX-License-Identifier: Apache-2.0
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...kernels.backends import UnsupportedError
from ...kernels.moe.api import fused_moe
from ...kernels.moe.call import Mode
from ...training.layer import fake_quantized_moe
from ..active import say_active
from ..canary import canary_asked_for
from .module import FLAGS, projections, sources
from .packed import packed_of, quantize

if TYPE_CHECKING:
    from ...canary import Canary


class Implementation(NamedTuple):
    """The arithmetic of one name."""

    activation: Mode
    batch_invariant: bool


IMPLEMENTATIONS = {
    "nvfp4_moe": Implementation("per-token", False),
    "nvfp4_moe_batch_invariant": Implementation("per-token", True),
    "nvfp4_moe_w4a16": Implementation("bf16", False),
    "nvfp4_moe_w4a16_batch_invariant": Implementation("bf16", True),
}
"""By the names that `register` gives them: values of `experts_implementation`."""


DEFAULT = "nvfp4_moe"
"""The implementation of a checkpoint's model for which none of ours was asked."""

NO_GRADIENT = (
    "a gradient is asked for, and the {} were read from an NVFP4 checkpoint: run under "
    "torch.no_grad()"
)
"""The refusal of a gradient, with the name of what was read."""

OLDEST = (5, 7)
"""The first version of transformers that accepts registered names; 5.6 has a fixed list."""


def register(canary: "Canary | None" = None) -> None:
    """Add `IMPLEMENTATIONS` to transformers' experts functions, and our quantizer, in this process.

    Then `from_pretrained(..., experts_implementation="nvfp4_moe")` and
    `model.set_experts_implementation("nvfp4_moe")` take them. It may be called again.

    Args:
        canary: watches the layers; omitted, the one that NVFP4_MOE_CANARY asks for, or none.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        UnsupportedError: it is older than 5.7.
        ValueError: a variable of the canary.
    """
    import transformers

    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
        raise UnsupportedError(
            f"transformers {transformers.__version__} is installed; it must be 5.7 or later, which "
            "accepts experts implementations of other packages"
        )
    from transformers.integrations.moe import ExpertsInterface

    from . import quantizer

    quantizer.register()
    if canary is None:
        canary = canary_asked_for()
    for name, implementation in IMPLEMENTATIONS.items():
        ExpertsInterface.register(name, partial(experts_forward, implementation, canary=canary))
    names = ", ".join(IMPLEMENTATIONS)
    say_active("transformers", transformers.__version__, f"experts_implementation of {names}")


def prepare(model: torch.nn.Module) -> int:
    """Quantize the experts of every layer now, and return how many layers there are.

    It is needed before `torch.compile` of a model that has not run, after weights were written through
    `.data`, and before the replay of a CUDA graph over new weights; else the layers' first calls do it.

    Raises:
        UnsupportedError: a layer is not modelled, and why.
    """
    layers = [m for m in model.modules() if all(hasattr(m, flag) for flag in FLAGS)]
    for layer in layers:
        quantize(layer)
    return len(layers)


def experts_forward(
    implementation: Implementation,
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    canary: "Canary | None" = None,
) -> torch.Tensor:
    """Run a module's experts in NVFP4.

    Where a gradient is asked for, `fake_quantized_moe` runs: it has the same bits and a straight-through
    gradient.

    Args:
        implementation: the first parameter, which `register` binds.
        module: the experts module, which holds the weights.
        hidden_states: [T, H] bf16.
        top_k_index: [T, K] int32 or int64; an id that is no expert's of this rank, as expert parallelism
            leaves them, adds nothing.
        top_k_weights: [T, K] bf16 or fp32.
        canary: watches calls without a gradient; the last parameter, which `register` binds.

    Returns:
        [T, H] bf16.

    Raises:
        UnsupportedError: a module that is not modelled; hidden states of another dtype; a gradient with
            experts that were read from an NVFP4 checkpoint.
        ValueError, TypeError: as `prepare_experts` and `fused_moe`.
    """
    if hidden_states.dtype != torch.bfloat16:
        raise UnsupportedError(
            f"{type(module).__name__} was given hidden states of {hidden_states.dtype}; they must be "
            "torch.bfloat16: load the model with dtype=torch.bfloat16"
        )
    packed = packed_of(module)
    local = packed.experts.num_local
    ids = torch.where(top_k_index < local, top_k_index, -1).to(torch.int32)
    routing = ids.contiguous(), top_k_weights.contiguous()
    states = hidden_states.contiguous()
    own = [] if packed.held is None else sources(module)
    if not _needs_gradient(hidden_states, top_k_weights, *own):
        layer = fused_moe if canary is None else canary.fused_moe
        return layer(
            states,
            packed.experts,
            routing,
            activation=implementation.activation,
            batch_invariant=implementation.batch_invariant,
        )
    if packed.held is None:
        raise UnsupportedError(NO_GRADIENT.format("experts"))
    w13, w2, w13_bias, w2_bias = projections(module)
    return fake_quantized_moe(
        states,
        w13,
        w2,
        routing,
        packed.gate.activation,
        activation_mode=implementation.activation,
        experts=packed.experts,
        w13_bias=w13_bias,
        w2_bias=w2_bias,
        batch_invariant=implementation.batch_invariant,
    )


def _needs_gradient(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
