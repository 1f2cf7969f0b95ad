"""The methods that vLLM calls for a layer of experts: to make, read and pack weights, and to run it.

Each class has vLLM's own weights of one format, under its base's names, so that every loader of vLLM
fills them. After loading, `Experts` take their place. vLLM routes; it runs shared experts beside the
layer, sums over ranks and records the routing itself.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from typing import Any

import torch
from vllm import envs
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w4a4_nvfp4 import (  # noqa: E501
    CompressedTensorsW4A4Nvfp4MoEMethod,
)
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4FusedMoE
from vllm.model_executor.layers.quantization.online.moe_base import OnlineMoEMethodBase

from ...kernels.backends import UnsupportedError
from ...kernels.moe.call import Mode
from ...reference.recipe import BLOCK_SIZE
from ...reference.weights.experts import Experts
from ..canary import canary_asked_for, watched_fused_moe
from ..fused import refuse_a_dropped_switch
from ..packing import Packed, check_sizes, from_bf16, from_nvfp4, tensors_of
from ..quantizations import refuse_static_of_bf16
from .gate import gate_of, is_interleaved

PROCESSED = "_already_called_process_weights_after_loading"
"""The attribute of a layer by which vLLM's reload asks for its weights to be packed anew."""


class Served:
    """The part that is the same for all formats; each class has a base of vLLM beside it."""

    supports_pre_processed_weights = False

    def _serve(self, moe: Any, activation: Mode) -> None:
        """Take the layer's settings; refuse what is not served before any weight is read."""
        self.moe = moe
        self.gate = gate_of(moe)
        refuse_a_dropped_switch(activation != "static")
        self.activation = activation
        self.batch_invariant = bool(envs.VLLM_BATCH_INVARIANT)
        self.canary = canary_asked_for()
        self.experts: Experts | None = None
        self._read: list[str] = []

    @property
    def supports_eplb(self) -> bool:
        return False

    @property
    def is_monolithic(self) -> bool:
        return False

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make the parameters that vLLM reads the checkpoint into.

        Raises:
            UnsupportedError: sizes that are not whole blocks.
        """
        check_sizes(hidden_size, intermediate_size_per_partition)
        before = set(layer._parameters)
        super().create_weights(  # type: ignore[misc]
            layer,
            num_experts,
            hidden_size,
            intermediate_size_per_partition,
            params_dtype,
            **extra_weight_attrs,
        )
        self._read = [name for name in layer._parameters if name not in before]

    def packed(self, layer: Any) -> Experts:
        """Return experts of the weights that have been read."""
        raise NotImplementedError

    def _laid_out(self, w13: Packed, w2: Packed, layer: Any) -> Experts:
        """Return experts of a checkpoint that is quantized already."""
        static, interleaved = self.activation == "static", is_interleaved(self.moe)
        experts = from_nvfp4(self.gate, w13, w2, static=static, interleaved=interleaved)
        return _in_place(experts, layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put `Experts` in the place of the weights that have been read.

        When vLLM reloads weights, it copies the new parameters into the memory of the first ones, which
        CUDA graphs have captured, so the first `Experts` stay those that run.
        """
        if getattr(layer, PROCESSED, False):
            return
        experts = self.packed(layer)
        for name in self._read:
            delattr(layer, name)
        for name, tensor in tensors_of(experts).items():
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            layer.register_parameter(f"nvfp4_{name}", parameter)
        if self.experts is None:
            self.experts = experts
        setattr(layer, PROCESSED, True)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run the routed experts of this rank.

        Args:
            x: [T, H] bf16.
            topk_weights: [T, K] bf16 or fp32; topk_ids [T, K] int32 or int64, experts of all ranks.
            shared_experts, shared_experts_input: not read; vLLM's runner runs them beside the layer.

        Returns:
            [T, H] bf16; experts of other ranks add nothing.
        """
        assert self.experts is not None, "vLLM has not packed the weights"
        return watched_fused_moe(
            self.canary,
            layer.layer_name,
            hidden_states=x.contiguous(),
            experts=self.experts,
            routing=(_local(topk_ids, layer.expert_map), topk_weights.contiguous()),
            activation=self.activation,
            batch_invariant=self.batch_invariant,
        )


class OnlineNvfp4MoE(Served, OnlineMoEMethodBase):
    """Weights in bf16, which are quantized layer by layer while the checkpoint is read."""

    def __init__(self, moe: Any, activation: Mode):
        refuse_static_of_bf16(activation)
        OnlineMoEMethodBase.__init__(self, moe)
        self._serve(moe, activation)

    def packed(self, layer: Any) -> Experts:
        self._zero_padding(layer)
        return _in_place(
            from_bf16(
                self.gate,
                layer.w13_weight.data,
                layer.w2_weight.data,
                _data(layer, "w13_bias"),
                _data(layer, "w2_bias"),
                interleaved=is_interleaved(self.moe),
            ),
            layer,
        )


class ModelOptNvfp4MoE(Served, ModelOptNvFp4FusedMoE):
    """ModelOpt's NVFP4. vLLM's loader reads two scales of w13 where the class's name has ModelOpt."""

    def __init__(self, quant_config: Any, moe_config: Any):
        # Its own base chooses one of vLLM's backends there, which no other GPU has.
        FusedMoEMethodBase.__init__(self, moe_config)
        self._serve(moe_config, quant_config.activation)
        self.quant_config = quant_config
        # Then the loader reads the activation scales of all ranks' experts.
        self.use_global_sf = self.activation == "static"

    def packed(self, layer: Any) -> Experts:
        w13 = Packed(
            layer.w13_weight.data,
            layer.w13_weight_scale.data,
            layer.w13_weight_scale_2.data,
            layer.w13_input_scale.data,
        )
        w2 = Packed(
            layer.w2_weight.data,
            layer.w2_weight_scale.data,
            layer.w2_weight_scale_2.data,
            layer.w2_input_scale.data,
        )
        return self._laid_out(w13, w2, layer)


class CompressedTensorsNvfp4MoE(Served, CompressedTensorsW4A4Nvfp4MoEMethod):
    """compressed-tensors' NVFP4, whose scalars are reciprocals."""

    def __init__(self, quant_config: Any, moe_config: Any):
        FusedMoEMethodBase.__init__(self, moe_config)
        self._serve(moe_config, quant_config.activation)
        if self.activation == "static" and moe_config.moe_parallel_config.use_ep:
            raise UnsupportedError(
                "vLLM reads compressed-tensors' activation scales of this rank's experts alone; static "
                "scales are the largest over all: take nvfp4_moe, or no expert parallelism"
            )
        self.group_size = BLOCK_SIZE

    def packed(self, layer: Any) -> Experts:
        w13 = Packed(
            layer.w13_weight_packed.data,
            layer.w13_weight_scale.data,
            1.0 / layer.w13_weight_global_scale.data,
            1.0 / layer.w13_input_global_scale.data,
        )
        w2 = Packed(
            layer.w2_weight_packed.data,
            layer.w2_weight_scale.data,
            1.0 / layer.w2_weight_global_scale.data,
            1.0 / layer.w2_input_global_scale.data,
        )
        return self._laid_out(w13, w2, layer)


def _local(ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """Return this rank's numbers of experts, int32; -1 stands for another rank's, and for none."""
    if expert_map is not None:
        ids = torch.where(ids < 0, -1, expert_map[ids.clamp(min=0).long()])
    return ids.to(torch.int32).contiguous()


def _in_place(experts: Experts, layer: Any) -> Experts:
    """The experts, whose rows the router's weights multiply first where the model has it so."""
    return replace(experts, router_weight_on_input=bool(layer.apply_router_weight_on_input))


def _data(layer: Any, name: str) -> torch.Tensor | None:
    parameter = getattr(layer, name, None)
    return None if parameter is None else parameter.data
