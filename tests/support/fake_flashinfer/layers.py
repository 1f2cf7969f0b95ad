"""FlashInfer's three compiled layers: decode the arguments, choose how to add, ask the reference."""

# SPDX-License-Identifier: Apache-2.0
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch

from nvfp4_moe.differential.conforming import CONFORMING
from nvfp4_moe.kernels.flashinfer import version
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.layouts import from_linear
from nvfp4_moe.reference.moe.baseline_moe import baseline_moe
from nvfp4_moe.reference.moe.hidden_states import Activations
from nvfp4_moe.reference.moe.layer import MoEResult, Stages, fused_moe, read_back
from nvfp4_moe.reference.moe.routing import unpack_topk
from nvfp4_moe.reference.moe.variants import VARIANTS
from nvfp4_moe.reference.quantize import quantize_per_token
from nvfp4_moe.reference.recipe import Recipe, SfLayout
from nvfp4_moe.reference.weights.experts import Experts
from nvfp4_moe.reference.weights.layout import row_order

from . import compiled, decode
from .baseline_layers import BaselineLayers
from .behaviour import Behaviour
from .environment import OF_ENVIRONMENT, code_of, recipe

Tensor = torch.Tensor
UNTUNED = -1
WAYS = (
    "fp64",
    "fp32, pairwise",
    "tensor core, steps of 16, 2 more bits",
    "tensor core, steps of 16, 1 more bit",
    "fp32, split",
    "fp32, ascending",
)
"""The order in which each tactic takes its sums; all keep the contract."""
TRTLLM_TACTICS = [[8, 3], [16, 19], [64, 5], [128, 19], [192, 7]]
CUTLASS_TACTICS = (3, 4)
"""Tactics of the first GEMM are 0 to 2, of the second 3 to 6; the last does not fit the GPU."""


@dataclass(frozen=True)
class Ran:
    backend: str
    tactic: str
    """The name that `differential.flashinfer_tactics` gives it; CuTe-DSL's default has one of those."""


@dataclass
class Kernels:
    behaviour: Behaviour
    ran: list[Ran] = field(default_factory=list)

    def run(self, layer: str, tactic: str, given: dict[str, Any]) -> MoEResult:
        self.ran.append(Ran(f"flashinfer:{layer}", tactic))
        result = fused_moe(**self.behaviour.layer(given, tactic))
        return self._changed(result)

    def run_baseline(self, layer: str, tactic: str, given: dict[str, Any]) -> MoEResult:
        self.ran.append(Ran(layer, tactic))
        return self._changed(baseline_moe(**self.behaviour.baseline(given, tactic)))

    def _changed(self, result: MoEResult) -> MoEResult:
        return replace(result, output=self.behaviour.output(result.output, len(self.ran) - 1))


def _stages(first: int, second: int) -> Stages:
    """The sums of the two GEMMs, each in one of the `WAYS`."""
    first_way, second_way = (CONFORMING[WAYS[i % len(WAYS)]] for i in (first, second))
    return Stages(gemm1=first_way.gemm1, gemm2=second_way.gemm2)


def _experts(
    w13: decode.Weights,
    w2: decode.Weights,
    kind: ActivationType,
    valid: tuple[int | None, int | None],
    scalars: tuple[Tensor, Tensor, Tensor],
    **optional: Tensor | None,
) -> Experts:
    """The reference's experts of decoded weights; biases among the optional, rows natural."""
    order1, order2 = row_order(w13[0].shape[1], kind.gated), row_order(w2[0].shape[1], False)
    biases = {
        name: None if (bias := optional.pop(name, None)) is None else bias[:, order].contiguous()
        for name, order in (("gemm1_bias", order1), ("gemm2_bias", order2))
    }
    (c1, s1), (c2, s2) = (
        (codes[:, order].contiguous(), from_linear(scales[:, order], SfLayout.layout_128x4))
        for (codes, scales), order in ((w13, order1), (w2, order2))
    )
    hidden, intermediate = c2.shape[1], c2.shape[2] * 2
    return Experts(
        c1,
        s1.view(torch.float8_e4m3fn),
        c2,
        s2.view(torch.float8_e4m3fn),
        *scalars,
        valid[0] or hidden,
        valid[1] or intermediate,
        kind,
        **biases,
        **optional,
    )


class Module:
    """A compiled module, of which FlashInfer takes hold of more functions than our adapters call."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def absent(*_: Any) -> None:
            raise NotImplementedError(f"the fake FlashInfer has no {name}")

        return absent


class Trtllm(BaselineLayers, Module):
    """`gen_trtllm_gen_fused_moe_sm100_module().build_and_load()`, of TensorRT-LLM's cubins."""

    @compiled.VALID_CONFIGS
    def trtllm_get_valid_moe_configs(self):
        return [list(tactic) for tactic in TRTLLM_TACTICS]

    @compiled.FP4_BLOCK_SCALE
    def trtllm_fp4_block_scale_moe(
        self, routing_input_mode, routing_logits, topk_ids, topk_weights, routing_bias,
        hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale, gemm1_bias,
        gemm1_alpha, gemm1_beta, gemm1_clamp_limit, gemm2_weights, gemm2_weights_scale, gemm2_bias,
        output1_scales_scalar, output1_scales_gate_scalar, output2_scales_scalar, per_token_scales,
        num_experts, top_k, n_group, topk_group, intermediate_size, local_expert_offset,
        local_num_experts, routed_scaling_factor, routing_method_type, do_finalize, act_type, output,
        config_index, norm_topk_prob, valid_hidden_size, valid_intermediate_size,
        nvfp4_4over6_code=OF_ENVIRONMENT,
    ):  # fmt: skip
        kind, tokens = ActivationType(act_type), hidden_states.shape[0]
        w13 = decode.trtllm(gemm1_weights, gemm1_weights_scale, kind.gated)
        w2 = decode.trtllm(gemm2_weights, gemm2_weights_scale, False)
        assert w13[0].shape[0] == local_num_experts and w2[0].shape[2] * 2 == intermediate_size
        biases = {
            name: None if bias is None else bias[:, decode.trtllm_rows(bias.shape[1], gated)]
            for name, bias, gated in (
                ("gemm1_bias", gemm1_bias, kind.gated),
                ("gemm2_bias", gemm2_bias, False),
            )
        }
        experts = _experts(
            w13,
            w2,
            kind,
            (valid_hidden_size, valid_intermediate_size),
            (output1_scales_scalar, output1_scales_gate_scalar, output2_scales_scalar),
            gemm1_alpha=gemm1_alpha,
            gemm1_beta=gemm1_beta,
            gemm1_clamp_limit=gemm1_clamp_limit,
            **biases,
        )
        ids, weights = self._routed(
            routing_input_mode,
            topk_ids,
            topk_weights,
            routing_logits,
            routing_bias,
            decode.routing(
                routing_method_type,
                top_k,
                n_group,
                topk_group,
                routed_scaling_factor,
                norm_topk_prob,
            ),
        )
        tile, number = config_index
        untuned = tile == UNTUNED
        tactic = "default" if untuned else json.dumps([tile, number])
        way = 0 if untuned else TRTLLM_TACTICS.index([tile, number]) + 1
        scales = decode.rows_of_scales(hidden_states_scale, tokens)
        result = self._kernels.run(
            "trtllm",
            tactic,
            {
                "activations": Activations(hidden_states, scales, per_token_scales),
                "experts": experts,
                "ids": ids,
                "weights": weights,
                "recipe": recipe("cuda", nvfp4_4over6_code),
                "local_expert_offset": local_expert_offset,
                "finalize_order": "flashinfer",
                "stages": _stages(way, way + 1),
            },
        )
        if do_finalize:
            output.copy_(result.output)
            return []
        local = ids - local_expert_offset
        return self._unfinalized(result.rows, local, local_num_experts, 8 if untuned else tile)

    def _routed(self, mode, topk_ids, topk_weights, logits, bias, routing):
        from flashinfer.fused_moe.core import RoutingInputMode

        if mode == RoutingInputMode.UnpackedPrecomputed:
            return topk_ids, topk_weights
        if mode == RoutingInputMode.FromLogits:
            ids, weights = self._kernels.behaviour.route(logits, routing, bias)
        else:
            ids, weights = unpack_topk(topk_ids)
        if topk_weights.numel():  # the caller's buffer, which the kernel fills
            topk_weights.copy_(weights)
        return ids, weights

    def _unfinalized(self, rows, local, num_local, tile):
        """[rows [P, H], -, permuted row of each expanded index]: experts padded to tiles."""
        flat, rows = local.reshape(-1), rows.flatten(0, 1)
        permuted = torch.full_like(flat, -1)
        start = 0
        for e in range(num_local):
            mine = (flat == e).nonzero()[:, 0]
            permuted[mine] = start + torch.arange(mine.numel(), dtype=permuted.dtype)
            start += -(-mine.numel() // tile) * tile
        out = torch.full((start, rows.shape[1]), torch.nan, dtype=rows.dtype)
        out[permuted[permuted >= 0].long()] = rows[permuted >= 0]
        return [out, torch.empty(0), permuted]


class Cutlass(Module):
    """`gen_cutlass_fused_moe_sm100_module().build_and_load()` and the runner that its `init` gives."""

    def init(self, *options: Any) -> Any:
        first, second = CUTLASS_TACTICS
        return SimpleNamespace(
            get_gemm1_tactic_count=lambda: first,
            get_gemm2_tactic_count=lambda: second,
            get_tactic_occupancy=lambda tactic: int(tactic < first + second - 1),
            run_moe=self.run_moe,
        )

    def set_deepgemm_jit_include_dirs(self, folders: list[str]) -> None:
        pass

    @compiled.CUTLASS
    def run_moe(
        self, output, input, token_selected_experts, token_final_scales, fc1_expert_weights,
        fc2_expert_weights, quant_scales, input_sf, situ_beta, situ_linear_beta, tp_size, ep_rank,
        profile_ids, base_activation_type, nvfp4_4over6_code=OF_ENVIRONMENT,
    ):  # fmt: skip
        assert tp_size == 1
        kind = ActivationType(base_activation_type)
        if kind == ActivationType.Situ and not all(  # it takes 4 and 25 without
            beta is not None and (beta == 1).all() for beta in (situ_beta, situ_linear_beta)
        ):
            raise NotImplementedError("the fake FlashInfer has no other SiTU than that of 1 and 1")
        act1, sf1, alpha1, act2, sf2, alpha2 = quant_scales
        w13 = decode.cutlass(fc1_expert_weights, sf1)
        w2 = decode.cutlass(fc2_expert_weights, sf2)
        experts = replace(
            # `alpha1` goes before the activation of its bf16 rounding; nothing follows it.
            _experts(w13, w2, kind, (None, None), (torch.ones_like(alpha1), alpha1, alpha2)),
            input_scale=act1.reshape(1),
            intermediate_scale=act2.reshape(1),
        )
        first, second = (0 if t == UNTUNED else t + 1 for t in profile_ids)
        names = [f"gemm{i} {t}" for i, t in enumerate(profile_ids, 1) if t != UNTUNED]
        scales = decode.rows_of_scales(input_sf, input.shape[0])
        result = self._kernels.run(
            "cutlass",
            " ".join(names) or "default",
            {
                "activations": Activations(input, scales),
                "experts": experts,
                "ids": token_selected_experts,
                "weights": token_final_scales,
                "recipe": recipe("cuda", nvfp4_4over6_code),
                "local_expert_offset": ep_rank * w13[0].shape[0],
                "finalize_order": "slot",
                "variant": "cutlass",
                "stages": _stages(first, second),
            },
        )
        output.copy_(result.output)


class CuteDsl:
    """`_moe_core_impl` of `fused_moe/cute_dsl/fused_moe.py`, under which every kernel is."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    @compiled.CUTE_DSL_CORE
    def core(
        self, x, x_sf, token_selected_experts, token_final_scales, w1_weight, w1_weight_sf,
        w1_alpha, fc2_input_scale, w2_weight, w2_weight_sf, w2_alpha, num_local_experts,
        local_expert_offset, tile_size, gemm1_mma_tiler_mn, gemm1_cluster_shape_mn,
        gemm2_mma_tiler_mn, gemm2_cluster_shape_mn, moe_output, per_token_scale, output_dtype,
        use_fused_finalize, activation_type, swiglu_alpha, swiglu_beta, swiglu_limit,
        nvfp4_4over6=OF_ENVIRONMENT,
    ):  # fmt: skip
        constants = (swiglu_alpha, swiglu_beta, swiglu_limit)
        if constants != (1.0, 0.0, torch.finfo(torch.float32).max):
            raise NotImplementedError("the fake FlashInfer has no constants of the activation")
        if per_token_scale is None or output_dtype != torch.bfloat16:
            raise NotImplementedError("the fake FlashInfer has per-token scales and bf16 alone")
        kind = ActivationType(activation_type)
        w13 = decode.cute_dsl(w1_weight, w1_weight_sf, kind.gated)
        w2 = decode.cute_dsl(w2_weight, w2_weight_sf, False)
        assert w13[0].shape[0] == num_local_experts
        up = w1_alpha if kind.gated else torch.ones_like(w1_alpha)
        tactic = (
            tile_size,
            (tuple(gemm1_mma_tiler_mn), tuple(gemm1_cluster_shape_mn), False),
            (tuple(gemm2_mma_tiler_mn), tuple(gemm2_cluster_shape_mn), False),
        )
        first = tile_size // 256 * 2 + gemm1_mma_tiler_mn[1] // 256
        second = first * 3 + gemm2_mma_tiler_mn[1] // 256 + 2 * (gemm2_cluster_shape_mn[1] - 1)
        stages = replace(_stages(first, second), requantize=_requantize(fc2_input_scale))
        result = self._kernels.run(
            "cute-dsl",
            json.dumps(tactic),
            {
                "activations": Activations(
                    x, decode.rows_of_scales(x_sf, x.shape[0]), per_token_scale
                ),
                "experts": _experts(w13, w2, kind, (None, None), (up, w1_alpha, w2_alpha)),
                "ids": token_selected_experts,
                "weights": token_final_scales,
                "recipe": recipe("cute-dsl", code_of(nvfp4_4over6)),
                "local_expert_offset": local_expert_offset,
                "finalize_order": VARIANTS["cute-dsl"].order(version.HERE.contract),
                "stages": fused_finalize(stages) if use_fused_finalize else stages,
            },
        )
        return moe_output.copy_(result.output)


def _requantize(scale_inv: Tensor) -> Callable[..., Any]:
    def of(y: Tensor, _: Any, recipe: Recipe, steps: dict[str, Tensor]) -> Any:
        q = quantize_per_token(y.flatten(0, 1), float(scale_inv), recipe)
        return read_back(q, y.shape[:2], steps)

    return of


def fused_finalize(stages: Stages) -> Stages:
    """Weighted before a row is rounded, and added up in bf16, as atomics do."""

    def finalize(rows: Tensor, weights: Tensor, *_: Any) -> Tensor:
        total = torch.zeros_like(rows[:, 0]).bfloat16()
        for k in range(rows.shape[1]):
            total = total + (weights[:, k, None].float() * rows[:, k]).bfloat16()
        return total.float()

    return replace(stages, round_rows=torch.Tensor.float, finalize=finalize)
