"""The rules that FlashInfer's fused NVFP4 layers share."""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from ...reference.activation import ELSEWHERE, FlashInferLayer
from ...reference.moe.finalize import split_k_groups
from ...reference.recipe import LayerBuild
from .. import environment
from ..moe.call import MoECall
from . import rules
from .description import OMITTED, POSITIONAL, Argument, OfType
from .rules import Rule, on_no_gpu
from .version import SINCE_NEW, UNTIL_NEW

COMMON: tuple[Rule[MoECall], ...] = (
    *rules.COMMON,
    on_no_gpu("hidden_states are on the CPU"),
    # The launcher divides by the number of tokens.
    Rule(
        lambda r: r.tokens == 0,
        "there are no tokens",
        "data/csrc/trtllm_batched_gemm_runner.cu:339",
    ),
)
"""The limits of every layer."""


def bits_of(build: LayerBuild) -> Rule[MoECall]:
    """A layer has the bits of one build."""
    return Rule(lambda r: r.build != build, f'its bits are those of build="{build}"')


def _not_in_its_layout(r: MoECall) -> bool:
    layout = r.variant.layout
    return layout is not None and not layout.is_in(r.experts)


def _how_to_have_it(r: MoECall) -> str:
    layout = r.variant.layout
    assert layout is not None
    add = layout.add.__name__
    return f"the experts are not in its layout: nvfp4_moe.{add}(experts) holds them so, too"


IN_ITS_LAYOUT: Rule[MoECall] = Rule(_not_in_its_layout, _how_to_have_it)


def _four_over_six(r: MoECall, *_: Any) -> Any:
    return OMITTED if r.is_static else r.recipe.four_over_six


def four_over_six(kind: Any = POSITIONAL) -> Argument:
    """4over6 of the intermediate. A layer takes one with per-token scales alone."""
    return Argument("nvfp4_4over6", _four_over_six, OfType("_UnsetType"), SINCE_NEW, kind)


def four_over_six_of_environment(source: str) -> Rule[MoECall]:
    """The quantizer of the intermediate reads 4over6 from the environment, as it is no argument."""

    def reason(r: MoECall) -> str:
        return (
            f"nvfp4_4over6 is {r.recipe.four_over_six}; it reads FLASHINFER_NVFP4_4OVER6*, which say "
            f"{environment.four_over_six()}"
        )

    return Rule(
        lambda r: r.recipe.four_over_six != environment.four_over_six(), reason, source, UNTIL_NEW
    )


def has_activation(layer: FlashInferLayer, source: str) -> Rule[MoECall]:
    """A layer has kernels for some activations: a column of the table of `reference.activation`."""
    reason = "activation {r.experts.activation.name} has no kernels"
    return Rule(lambda r: layer not in ELSEWHERE[r.experts.activation].flashinfer, reason, source)


def writes_bf16(source: str) -> Rule[MoECall]:
    """A layer writes bf16."""
    reason = "the output is {r.output_dtype}; its kernels, or its intermediate, are bfloat16"
    return Rule(lambda r: r.output_dtype != torch.bfloat16, reason, source)


NOT_BATCH_INVARIANT: Rule[MoECall] = Rule(
    lambda r: r.batch_invariant, "batch_invariant: its tiles and its order depend on the batch"
)


def _has_another_order(r: MoECall) -> bool:
    k, h = r.routing.top_k, r.experts.hidden_size
    splits = r.finalize_order == "flashinfer" and split_k_groups(r.tokens, k, h) > 1
    return splits or r.finalize_order == "slot-multiply"


def slot_order(source: str) -> Rule[MoECall]:
    """The layers other than TRT-LLM's add the rows of a token slot by slot."""
    return Rule(_has_another_order, 'its order is finalize_order="slot"', source)


def routing_limit(source: str) -> Rule[MoECall]:
    """A routing that is given has at most 2048 experts and 32 slots."""
    return Rule(
        lambda r: r.num_experts > 2048 or r.routing.top_k > 32,
        "it has at most 2048 experts and top_k 32",
        source,
    )


NO_LORA: Rule[MoECall] = Rule(lambda r: r.lora_delta is not None, "it has no gemm1_lora_delta")
NO_SHARED_EXPERTS: Rule[MoECall] = Rule(lambda r: r.shared_experts, "it has no shared experts")
