"""Small calls of the Triton kernels that between them show every mistake of `kernels.py`.

`answer` runs where the interpreter is on, in a copy of the package; the rest judges, in this one.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from nvfp4_moe import host
from nvfp4_moe.cases import inputs
from nvfp4_moe.cases import moe as moe_cases
from nvfp4_moe.cases import quantize as quantize_cases
from nvfp4_moe.cases.moe_case import MoECase
from nvfp4_moe.differential.conforming import SETTINGS, Setting
from nvfp4_moe.failures import slice_call
from nvfp4_moe.kernels.gemm_config import GemmConfig
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.moe.activations import Activations, quantize_activations
from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout

from .calls import Answered, Call, FusedCall, QuantizerCall
from .edge_calls import EDGE_CALLS

Tensor = torch.Tensor
_M = RoutingMethodType


_SETTINGS = SETTINGS | {
    s.name: s
    for s in (
        Setting("top 1", 24, 256, 128, 4, Routing(_M.Renormalize, 1), ActivationType.Relu2),
        # Experts 1 and 2 of 3, each with more than 48 rows: two tiles of 32, the last more than half
        # full.
        Setting(
            "many tokens",
            80,
            128,
            128,
            3,
            Routing(_M.Renormalize, 2),
            ActivationType.Relu2,
            offset=1,
            local=2,
        ),
        Setting("no groups", 8, 128, 128, 16, Routing(_M.DeepSeekV3, 4, None, None, 2.5)),
        Setting("wide", 8, 384, 128, 4, Routing(_M.Renormalize, 2)),
    )
}


def case_of(setting: Setting, *, bf16: bool = False) -> MoECase:
    """A setting's call as a case; `bf16`: its hidden states are not quantized."""
    call = setting.call(0)
    states = Activations(call.x) if bf16 else quantize_activations(call.x, call.recipe)
    return MoECase(
        setting.name,
        states,
        call.experts,
        call.routing,
        setting.experts,
        call.logits,
        call.routing_bias,
        local_expert_offset=call.local_expert_offset,
        recipe=call.recipe,
    )


def _cancelling() -> MoECase:
    """Tokens whose slots 0 and 2 cancel but for what was rounded away, and whose slot 1 remains."""
    exact = next(c for c in moe_cases.exact_cases() if "Identity" in c.name)
    tokens, slots = 4, 8
    weights = host.zeros(tokens, slots)
    weights[:, 0] = 2.0**26 * (1 + host.arange(1, tokens + 1).float() / 7)
    weights[:, 1], weights[:, 2] = 1.0, -weights[:, 0]
    ids = host.arange(tokens).int()[:, None].expand(-1, slots).contiguous()
    return replace(
        slice_call.keep_tokens(exact, range(tokens)),
        routing=Routing(_M.Renormalize, slots),
        ids=ids % exact.num_experts,
        weights=weights,
    )


def _case(name: str, *, bf16: bool = False) -> MoECase:
    return case_of(_SETTINGS[name], bf16=bf16)


def rows_at_edges() -> Tensor:
    """[55, 80]: more than 32 rows, blocks that are no multiple of 4; normal numbers, and ties."""
    some = [inputs.synthetic(kind, 20, 80) for kind in ("normal", "grid")]
    # Found by search: the order in which 4over6 adds its errors decides.
    near = inputs.synthetic("grid", 1500, 80, seed=5)[[463, 910, 1496]]
    return torch.cat([*some, _ties_of_scales(), near])


def _ties_of_scales() -> Tensor:
    """[12, 80]: maxima under which block scales lie between two of e4m3, and 4 and 6 err alike."""
    x = inputs.synthetic("normal", 12, 80).float().clamp(-1, 1) / 64
    odd = host.arange(8)[:, None].remainder(4).float() * 2 + 1
    x[:8, :1] = 7 * odd  # 448 times the quotient of a block's maximum and this is its scale
    x[:8, 16::16] = odd * host.arange(17, 32, 2).view(2, 4).repeat_interleave(4, 0) / 16
    x[8:] = x[8:].sign() * 7 * host.powers(-host.arange(5)).repeat_interleave(16)
    x[8:, ::3] = 0
    return x.bfloat16()


def _quantizer(recipe: Recipe, layout: SfLayout = SfLayout.layout_linear) -> QuantizerCall:
    return QuantizerCall(rows_at_edges(), quantize_cases.Case("per-token", recipe, layout))


def _saturating() -> QuantizerCall:
    """Under a global scale that is four times too large."""
    x = rows_at_edges()
    scale = 4 * quantize_cases.global_scale(x, Recipe())
    return QuantizerCall(
        x, quantize_cases.Case("global-scale", Recipe(), SfLayout.layout_linear, scale)
    )


_WIDE = GemmConfig(128, 32, 128, 1, 4)

CALLS: dict[str, Callable[[], Call]] = {
    **EDGE_CALLS,
    **{
        name: functools.partial(lambda name: FusedCall(_case(name)), name)
        for name in (
            "qwen",
            "deepseek",
            "gpt-oss",
            "grid",
            "4over6",
            "top 1",
            "no groups",
        )
    },
    "bf16": lambda: FusedCall(_case("qwen", bf16=True)),
    "cancelling": lambda: FusedCall(_cancelling()),
    "tiles of 16": lambda: FusedCall(_case("many tokens")),
    "tiles of 32": lambda: FusedCall(_case("many tokens"), _WIDE),
    "three launches": lambda: FusedCall(
        _case("many tokens"), _WIDE, {"permute._ONE_LAUNCH_SLOTS": 0}
    ),
    "K of 1 1/2 tiles": lambda: FusedCall(_case("wide"), GemmConfig(128, 16, 256, 1, 4)),
    "decoded": lambda: FusedCall(
        _case("many tokens"),
        GemmConfig(128, 16, 64, 1, 4, decoded=True),
        {"launch._DECODED_BYTES": 1},
    ),
    "quantizer, fast, 128x4": lambda: _quantizer(Recipe(), SfLayout.layout_128x4),
    "quantizer, exact, 8x4": lambda: _quantizer(Recipe("exact"), SfLayout.layout_8x4),
    "quantizer, 4over6": lambda: _quantizer(Recipe("fast", NVFP44Over6Config())),
    "quantizer, saturating": _saturating,
    "quantizer, fp32": lambda: QuantizerCall(
        rows_at_edges().float() * 1.01,
        quantize_cases.Case("fp32 per-token", Recipe(), SfLayout.layout_linear),
    ),
}
"""By name; each takes the interpreter a second or two."""


@functools.cache
def prepared(name: str) -> tuple[Call, Answered]:
    call = CALLS[name]()
    return call, call.judge()
