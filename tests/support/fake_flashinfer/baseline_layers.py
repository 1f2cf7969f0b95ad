"""FlashInfer's compiled BF16, FP8 and MXFP8 layers: decode the arguments, ask the reference."""

# SPDX-License-Identifier: Apache-2.0
import json
from typing import Any

import torch

from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.moe.baseline_moe import BaselineActivations, BaselineExperts

from . import compiled, decode

Tensor = torch.Tensor
MAJOR_K, BLOCK_MAJOR_K = 0, 2
DEEPSEEK, MX = 1, 2
UNTUNED = -1
NAMES = {
    "bf16": "flashinfer:bf16",
    "fp8 per tensor": "flashinfer:fp8-tensor",
    "fp8 block": "flashinfer:fp8-block",
    "mxfp8": "flashinfer:mxfp8",
}


class BaselineLayers:
    """Methods of the compiled module; it has `_kernels`, and `_routed` for what logits choose."""

    _kernels: Any
    _routed: Any

    @compiled.BF16
    def trtllm_bf16_moe(
        self, routing_input_mode, routing_logits, routing_bias, expert_indices, expert_weights,
        hidden_states, gemm1_weights, gemm2_weights, output, num_experts, top_k, n_group, topk_group,
        intermediate_size, local_expert_offset, local_num_experts, routed_scaling_factor,
        routing_method_type, use_shuffled_weight, weight_layout, moe_tactic, activation_type,
        norm_topk_prob,
    ):  # fmt: skip
        assert use_shuffled_weight and weight_layout == BLOCK_MAJOR_K
        kind = ActivationType(activation_type)
        w13, w2 = (
            w.permute(0, 2, 1, 3).flatten(2)[:, decode.trtllm_rows(w.shape[2], gated)]
            for w, gated in ((gemm1_weights, kind.gated), (gemm2_weights, False))
        )
        ids, weights = self._routed(
            routing_input_mode, expert_indices, expert_weights, routing_logits, routing_bias,
            decode.routing(routing_method_type, top_k, n_group, topk_group, routed_scaling_factor,
                           norm_topk_prob),
        )  # fmt: skip
        experts = BaselineExperts("bf16", kind, w13, w2)
        self._serve(
            moe_tactic,
            BaselineActivations(hidden_states),
            experts,
            ids,
            weights,
            local_expert_offset,
            output,
            (local_num_experts, intermediate_size),
        )
        return []

    @compiled.FP8_TENSOR_ROUTED
    def trtllm_fp8_per_tensor_scale_routed_moe(
        self, routing_input_mode, expert_indices, expert_weights, hidden_states, gemm1_weights,
        output1_scales_scalar, output1_scales_gate_scalar, gemm2_weights, output2_scales_scalar,
        output, intermediate_size, local_expert_offset, local_num_experts, config_index,
        activation_type,
    ):  # fmt: skip
        ids, weights = self._routed(
            routing_input_mode, expert_indices, expert_weights, None, None, None
        )
        self._per_tensor(
            ids, weights, hidden_states, gemm1_weights, output1_scales_scalar,
            output1_scales_gate_scalar, gemm2_weights, output2_scales_scalar, output,
            intermediate_size, local_expert_offset, local_num_experts, config_index, activation_type,
        )  # fmt: skip
        return []

    @compiled.FP8_TENSOR
    def trtllm_fp8_per_tensor_scale_moe(
        self, routing_logits, routing_bias, hidden_states, gemm1_weights, output1_scales_scalar,
        output1_scales_gate_scalar, gemm2_weights, output2_scales_scalar, output, num_experts, top_k,
        n_group, topk_group, intermediate_size, local_expert_offset, local_num_experts,
        routed_scaling_factor, routing_method_type, config_index, activation_type, norm_topk_prob,
    ):  # fmt: skip
        ids, weights = self._kernels.behaviour.route(
            routing_logits,
            decode.routing(routing_method_type, top_k, n_group, topk_group, routed_scaling_factor,
                           norm_topk_prob),
            routing_bias,
        )  # fmt: skip
        self._per_tensor(
            ids, weights, hidden_states, gemm1_weights, output1_scales_scalar,
            output1_scales_gate_scalar, gemm2_weights, output2_scales_scalar, output,
            intermediate_size, local_expert_offset, local_num_experts, config_index, activation_type,
        )  # fmt: skip
        return []

    @compiled.FP8_BLOCK
    def trtllm_fp8_block_scale_moe(
        self, routing_input_mode, routing_logits, expert_indices, expert_weights, routing_bias,
        hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale, gemm2_weights,
        gemm2_weights_scale, output, num_experts, top_k, n_group, topk_group, intermediate_size,
        local_expert_offset, local_num_experts, routed_scaling_factor, routing_method_type,
        use_shuffled_weight, weight_layout, config_index, quantization_type, act_type, norm_topk_prob,
    ):  # fmt: skip
        kind, mx = ActivationType(act_type), quantization_type == MX
        assert use_shuffled_weight == mx and weight_layout == MAJOR_K
        given = (gemm1_weights, gemm1_weights_scale), (gemm2_weights, gemm2_weights_scale)
        if mx:
            given = tuple(
                _of_mxfp8(*pair, gated)
                for pair, gated in zip(given, (kind.gated, False), strict=True)
            )
        else:
            tokens, blocks = hidden_states.shape[0], hidden_states.shape[1] // 128
            assert hidden_states_scale.shape == (blocks, tokens)
        (w13, s13), (w2, s2) = given
        experts = BaselineExperts("mxfp8" if mx else "fp8 block", kind, w13, w2, s13, s2)
        ids, weights = self._routed(
            routing_input_mode, expert_indices, expert_weights, routing_logits, routing_bias,
            decode.routing(routing_method_type, top_k, n_group, topk_group, routed_scaling_factor,
                           norm_topk_prob),
        )  # fmt: skip
        self._serve(
            config_index,
            BaselineActivations(hidden_states, hidden_states_scale),
            experts,
            ids,
            weights,
            local_expert_offset,
            output,
            (local_num_experts, intermediate_size),
        )
        return []

    def _per_tensor(
        self, ids, weights, x, gemm1, up, gate, gemm2, row, output, intermediate, offset, local,
        tactic, activation,
    ):  # fmt: skip
        """The scales that make these three scalars: the input's is in those of the first weights."""
        kind, sizes = ActivationType(activation), (local, intermediate)
        encode = up / gate if kind.gated else up  # one of all experts
        assert torch.allclose(encode, encode[:1].expand_as(encode), rtol=1e-6)
        w13, w2 = (
            w.view(torch.uint8)[:, decode.trtllm_rows(w.shape[1], gated)].view(w.dtype)
            for w, gated in ((gemm1, kind.gated), (gemm2, False))
        )
        experts = BaselineExperts(
            "fp8 per tensor",
            kind,
            w13,
            w2,
            1 / gate,
            1 / (row * encode[0]),
            torch.ones(()),
            encode[0],
        )
        self._serve(tactic, BaselineActivations(x), experts, ids, weights, offset, output, sizes)

    def _serve(self, tactic, activations, experts, ids, weights, offset, output, sizes):
        assert (experts.num_local, experts.w2.shape[2]) == sizes
        tile, number = tactic
        name = "default" if tile == UNTUNED else json.dumps([tile, number])
        result = self._kernels.run_baseline(
            NAMES[experts.format],
            name,
            {
                "activations": activations,
                "experts": experts,
                "ids": ids,
                "weights": weights,
                "local_expert_offset": offset,
            },
        )
        output.copy_(result.output)


def _of_mxfp8(codes: Tensor, scales: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    rows, columns = codes.shape[1:]
    place = decode.trtllm_rows(rows, gated)
    linear = decode.unswizzled(scales, rows, columns // 32)
    return codes.view(torch.uint8)[:, place].view(codes.dtype), linear[:, place]
