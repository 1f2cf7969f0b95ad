"""The arguments of FlashInfer's compiled functions, which the fake FlashInfer's methods replace.

FlashInfer's Python calls most of them by position. A description has every argument in the order of the
source, with a range of versions where an argument came or went; a method of the fake names those
that it reads. What it does not read must be absent, unless any value of it is right.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from nvfp4_moe.kernels.flashinfer import version
from nvfp4_moe.kernels.flashinfer.description import Argument


@dataclass(frozen=True)
class Compiled:
    """One compiled function.

    Args:
        source: the file that defines it: below `data/csrc`, or a module of FlashInfer's Python.
        name: its name there.
        arguments: of all versions, in order.
        unread: the names of the arguments whose values the fake does not need: buffers, streams, tiles.
    """

    source: str
    name: str
    arguments: tuple[Argument, ...]
    unread: frozenset[str] = frozenset()

    @property
    def names(self) -> list[str]:
        """The arguments of the installed version, in order."""
        here = version.HERE.described_as
        return [a.name for a in self.arguments if here in a.versions]

    def bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The values of a call, by name.

        Raises:
            TypeError: more values than arguments, or a name that no argument has.
        """
        names = self.names
        if len(args) > len(names) or not set(kwargs) <= set(names):
            raise TypeError(
                f"{self.name} takes {len(names)} arguments; {len(args)} came by position, and "
                f"{sorted(set(kwargs) - set(names))} are not among them"
            )
        return dict(zip(names, args, strict=False)) | kwargs

    def __call__(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate the method that replaces the function, and that names what it reads."""
        read = [name for name in inspect.signature(method).parameters if name != "self"]
        unknown = set(read) - {a.name for a in self.arguments}
        assert not unknown and not unknown & self.unread, f"{self.name} has no {unknown}"

        @functools.wraps(method)
        def stand_in(instance: Any, *args: Any, **kwargs: Any) -> Any:
            given = self.bound(args, kwargs)
            asked = [n for n, v in given.items() if n not in (*read, *self.unread) and _is_set(v)]
            if asked:
                raise NotImplementedError(f"the fake {self.name} has no {', '.join(asked)}")
            return method(instance, **{name: given[name] for name in read if name in given})

        stand_in.compiled = self  # type: ignore[attr-defined]
        return stand_in


def _is_set(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or bool(value)


def _rows(*parts: str | Argument) -> tuple[Argument, ...]:
    """Names, separated by spaces, and single rows with a range of versions."""
    rows: list[Argument] = []
    for part in parts:
        rows += [part] if isinstance(part, Argument) else map(Argument, part.split())
    return tuple(rows)


def _since_new(names: str) -> tuple[Argument, ...]:
    return tuple(Argument(name, versions=version.SINCE_NEW) for name in names.split())


def _compiled(
    source: str, name: str, *parts: str | Argument, unread: Iterable[str] = ()
) -> Compiled:
    return Compiled(source, name, _rows(*parts), frozenset(unread))


_LAUNCHER = "trtllm_fused_moe_kernel_launcher.cu"
_ROUTING = "num_experts top_k n_group topk_group"
_LOCAL = "intermediate_size local_expert_offset local_num_experts routed_scaling_factor"
_METADATA = (
    "norm_topk_prob routing_replay_out da_routing_metadata da_body_workspace is_da_body_preparation"
)
_UNREAD = ("enable_pdl", "routing_replay_out", "da_routing_metadata", "da_body_workspace")
_WORKSPACE = _since_new("workspace_buffer query_workspace_size")

VALID_CONFIGS = _compiled(
    _LAUNCHER,
    "trtllm_get_valid_moe_configs",
    _sizes := (
        "dtype_act dtype_weights fp8_quantization_type top_k hidden_size hidden_size_output "
        "intermediate_size num_local_experts"
    ),
    *_since_new("num_experts"),
    _options := (
        "act_type use_shuffled_weight weight_layout use_per_token_scaling num_tokens "
        "has_gemm1_lora_delta"
    ),
    unread=(*_sizes.split(), "num_experts", *_options.split()),
)
FP4_BLOCK_SCALE = _compiled(
    _LAUNCHER,
    "trtllm_fp4_block_scale_moe",
    "routing_input_mode routing_logits topk_ids topk_weights routing_bias hidden_states "
    "hidden_states_scale gemm1_weights gemm1_weights_scale gemm1_bias gemm1_lora_delta gemm1_alpha "
    "gemm1_beta gemm1_clamp_limit gemm2_weights gemm2_weights_scale gemm2_bias output1_scales_scalar "
    "output1_scales_gate_scalar output2_scales_scalar per_token_scales num_experts top_k "
    "num_fused_shared_experts n_group topk_group",
    _LOCAL,
    "routing_method_type do_finalize enable_pdl act_type output config_index",
    _METADATA,
    "valid_hidden_size valid_intermediate_size",
    *_WORKSPACE,
    *_since_new("nvfp4_4over6_code"),
    unread=_UNREAD,
)
BF16 = _compiled(
    _LAUNCHER,
    "trtllm_bf16_moe",
    "routing_input_mode routing_logits routing_bias expert_indices expert_weights hidden_states "
    "gemm1_weights gemm2_weights gemm1_lora_delta gemm1_alpha gemm1_beta gemm1_clamp_limit output",
    _ROUTING,
    _LOCAL,
    "routing_method_type use_shuffled_weight weight_layout do_finalize enable_pdl moe_tactic "
    "activation_type",
    _METADATA,
    *_WORKSPACE,
    unread=(*_UNREAD, "do_finalize"),
)
_TENSOR = (
    "hidden_states gemm1_weights output1_scales_scalar output1_scales_gate_scalar gemm2_weights "
    "output2_scales_scalar output",
    _ROUTING,
    _LOCAL,
    "use_routing_scales_on_input routing_method_type do_finalize enable_pdl config_index "
    "activation_type",
    _METADATA,
    "gemm1_clamp_limit",
    *_WORKSPACE,
)
FP8_TENSOR = _compiled(
    _LAUNCHER,
    "trtllm_fp8_per_tensor_scale_moe",
    "routing_logits routing_bias",
    *_TENSOR,
    unread=(*_UNREAD, "do_finalize"),
)
FP8_TENSOR_ROUTED = _compiled(
    _LAUNCHER, "trtllm_fp8_per_tensor_scale_routed_moe",
    "routing_input_mode expert_indices expert_weights routing_bias", *_TENSOR,
    unread=(
        *_UNREAD, "do_finalize", "num_experts", "top_k", "n_group", "topk_group",
        "routed_scaling_factor", "routing_method_type", "norm_topk_prob",
    ),
)  # fmt: skip
FP8_BLOCK = _compiled(
    _LAUNCHER,
    "trtllm_fp8_block_scale_moe",
    "routing_input_mode routing_logits expert_indices expert_weights routing_bias hidden_states "
    "hidden_states_scale gemm1_weights gemm1_weights_scale gemm1_lora_delta gemm1_bias gemm1_alpha "
    "gemm1_beta gemm1_clamp_limit gemm2_weights gemm2_weights_scale gemm2_bias output num_experts "
    "top_k num_fused_shared_experts n_group topk_group",
    _LOCAL,
    "routing_method_type use_shuffled_weight weight_layout do_finalize enable_pdl config_index "
    "quantization_type act_type",
    _METADATA,
    "valid_hidden_size valid_intermediate_size",
    *_WORKSPACE,
    unread=(*_UNREAD, "do_finalize", "valid_hidden_size", "valid_intermediate_size"),
)
CUTLASS = _compiled(
    "fused_moe/cutlass_backend/flashinfer_cutlass_fused_moe_binding.cu",
    "runMoe",
    "output input token_selected_experts token_final_scales fc1_expert_weights fc1_expert_biases "
    "fc2_expert_weights fc2_expert_biases quant_scales input_sf swiglu_alpha swiglu_beta swiglu_limit "
    "clamped_relu2_limit situ_beta situ_linear_beta swizzled_input_sf tp_size tp_rank ep_size ep_rank "
    "cluster_size cluster_rank enable_alltoall min_latency_mode profile_ids enable_pdl "
    "base_activation_type workspace_buffer",
    *_since_new("nvfp4_4over6_code"),
    unread=("ep_size", "cluster_size", "enable_pdl", "workspace_buffer"),
)
LAYERS = (VALID_CONFIGS, FP4_BLOCK_SCALE, BF16, FP8_TENSOR, FP8_TENSOR_ROUTED, FP8_BLOCK, CUTLASS)

CUTE_DSL_CORE = _compiled(
    "flashinfer.fused_moe.cute_dsl.fused_moe", "_moe_core_impl",
    "x x_sf token_selected_experts token_final_scales w1_weight w1_weight_sf w1_alpha "
    "fc2_input_scale w2_weight w2_weight_sf w2_alpha num_experts top_k num_local_experts "
    "local_expert_offset tile_size gemm1_mma_tiler_mn gemm1_cluster_shape_mn gemm2_mma_tiler_mn "
    "gemm2_cluster_shape_mn gemm1_mma_tiler gemm1_mma_inst_shape gemm2_mma_tiler "
    "gemm2_mma_inst_shape moe_sort_buffers gemm1_out gemm1_out_scale moe_output per_token_scale "
    "localized_memset_stream localized_weights localized_streams sm_count aux_stream main_event "
    "memset_event output_dtype use_async_memset use_fused_finalize enable_pdl activation_type "
    "swiglu_alpha swiglu_beta swiglu_limit situ_beta situ_linear_beta",
    *_since_new("clamped_relu2_limit"), "nvfp4_4over6",
    *_since_new(
        "weight_dtype gemm1_k_steps gemm2_k_steps gemm1_use_clc_scheduler gemm2_use_clc_scheduler "
        "swap_ab"
    ),
    unread=(
        "num_experts", "top_k", "gemm1_mma_tiler", "gemm1_mma_inst_shape", "gemm2_mma_tiler",
        "gemm2_mma_inst_shape", "moe_sort_buffers", "gemm1_out", "gemm1_out_scale", "sm_count",
        "aux_stream", "main_event", "memset_event", "use_async_memset", "enable_pdl", "weight_dtype",
        "gemm1_k_steps", "gemm2_k_steps", "gemm1_use_clc_scheduler", "gemm2_use_clc_scheduler",
    ),
)  # fmt: skip
_CUTE_DSL_QUANTIZER = "flashinfer.quantization.kernels.nvfp4_quantize"
CUTE_DSL_PER_TOKEN = _compiled(
    _CUTE_DSL_QUANTIZER,
    "nvfp4_quantize_per_token_cute_dsl",
    "input global_scale_inv sf_layout enable_pdl out_scale nvfp4_4over6",
    *_since_new("valid_rows row_limits rows_per_group sf_rows_per_group"),
    unread=("enable_pdl",),
)
CUTE_DSL_GLOBAL = _compiled(
    _CUTE_DSL_QUANTIZER,
    "nvfp4_quantize_cute_dsl",
    "input global_scale sf_layout enable_pdl nvfp4_4over6 out",
    unread=("enable_pdl",),
)
CAKE = _compiled(
    "flashinfer.experimental.cake_nvfp4_per_token.cake_backend",
    "nvfp4_quantize_per_token",
    "x global_scale_inv out_scale enable_pdl",
    unread=("enable_pdl",),
)
PYTHON = (CUTE_DSL_CORE, CUTE_DSL_PER_TOKEN, CUTE_DSL_GLOBAL, CAKE)

_CLOSURES = "flashinfer.quantization.fp4_quantization"
FP4_QUANTIZE = _compiled(
    _CLOSURES,
    "fp4_quantize_sm100",
    "input global_scale sf_vec_size sf_use_ue8m0 is_sf_swizzled_layout is_sf_8x4_layout "
    "is_global_scale_inversed enable_pdl nvfp4_4over6_code",
    unread=("enable_pdl",),
)
NVFP4_PER_TOKEN = _compiled(
    _CLOSURES,
    "nvfp4_quant_and_per_token_scale_sm100",
    "input scale_inv expanded_idx_to_permuted_idx sf_layout nvfp4_4over6_code",
)
CLOSURES = (FP4_QUANTIZE, NVFP4_PER_TOKEN)
