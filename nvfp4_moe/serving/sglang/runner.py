"""The MoE runner that SGLang calls for a layer of ours, between its dispatch and its sum over ranks.

SGLang maps ids to this rank's experts before it calls a runner that it does not know, and gives -1 for
another rank's (sglang 0.5.23, `token_dispatcher/standard.py`).
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.moe.moe_runner.base import DispatchMoeRunnerCore, MoeQuantInfo
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
from sglang.srt.layers.moe.utils import RegisteredMoeRunnerBackend

from ...kernels.backends import UnsupportedError
from ...kernels.moe.call import Mode
from ...reference.weights.experts import Experts
from ..canary import watched_fused_moe
from .plugin import BACKEND

RUNNER = RegisteredMoeRunnerBackend(BACKEND)


@dataclass
class Nvfp4MoEQuantInfo(MoeQuantInfo):
    """A layer for `Nvfp4MoERunnerCore`."""

    experts: Experts
    activation: Mode
    batch_invariant: bool
    canary: Any  # `Canary`, or None
    layer_name: str


class Nvfp4MoERunnerCore(DispatchMoeRunnerCore):
    """`fused_moe` as SGLang's runner; `MoeRunnerConfig` has been read when the layer was made."""

    @property
    def runner_backend(self) -> RegisteredMoeRunnerBackend:
        return RUNNER

    def run_from_dispatch(
        self, dispatch_output: Any, quant_info: Any, runner_config: Any, hooks: Any = None
    ) -> StandardCombineInput:
        """Run the routed experts of this rank.

        Args:
            dispatch_output: SGLang's `StandardDispatchOutput`: hidden states [T, H] bf16, and a
                `StandardTopKOutput` with weights [T, K] bf16 or fp32 and ids [T, K] of this rank's
                experts, -1 for none. SGLang has multiplied the weights by its routed scaling factor.
            quant_info: `Nvfp4MoEQuantInfo`.
            runner_config: not read.
            hooks: LoRA's; None.

        Raises:
            UnsupportedError: a layer of another quantization, another form of a routing, hidden states
                that are quantized already, LoRA on experts.
        """
        if not isinstance(quant_info, Nvfp4MoEQuantInfo):
            raise UnsupportedError(
                f"--moe-runner-backend {BACKEND} has got {type(quant_info).__name__} of another "
                "quantization; give --quantization nvfp4_moe, too"
            )
        topk = dispatch_output.topk_output
        if topk.format.name != "STANDARD":
            raise UnsupportedError(f"topk_output is {topk.format.name}; it must be STANDARD")
        if dispatch_output.hidden_states_scale is not None:
            raise UnsupportedError("hidden states are quantized already; they must be bf16")
        if hooks is not None:
            raise UnsupportedError("nvfp4-moe's experts take no LoRA adapters")
        return StandardCombineInput(
            watched_fused_moe(
                quant_info.canary,
                quant_info.layer_name,
                hidden_states=dispatch_output.hidden_states.contiguous(),
                experts=quant_info.experts,
                routing=(
                    topk.topk_ids.to(torch.int32).contiguous(),
                    topk.topk_weights.contiguous(),
                ),
                activation=quant_info.activation,
                batch_invariant=quant_info.batch_invariant,
            )
        )
