"""NVFP4 with per-token scales: a bit-exact reference, Triton kernels, FlashInfer behind one call."""

# SPDX-License-Identifier: Apache-2.0
from . import starting as _starting

_starting.leave_on_interrupt()

from importlib.metadata import PackageNotFoundError, version

from .kernels import reload as _reload  # noqa: F401  `Experts.load_` in Triton
from .kernels.backends import (
    Explanation,
    Registration,
    UnsupportedError,
    register_backend,
)
from .kernels.dense_dispatch import explain_mm_fp4, mm_fp4
from .kernels.dispatch import explain, nvfp4_quantize
from .kernels.moe_autotune import autotune_fused_moe
from .kernels.moe_dispatch import (
    explain_fused_moe,
    fused_moe,
    trtllm_fp4_block_scale_moe,
    trtllm_fp4_block_scale_routed_moe,
)
from .kernels.producers import (
    add_rmsnorm_nvfp4_quantize,
    rmsnorm_nvfp4_quantize,
    silu_and_mul_nvfp4_quantize,
)
from .reference.activation import ActivationType
from .reference.moe.routing import Routing, RoutingMethodType
from .reference.recipe import NVFP44Over6Config, NVFP44Over6ErrMode, Recipe, SfLayout
from .reference.statistics.counts import (
    QuantizationStatistics,
    quantization_statistics,
    weight_statistics,
)
from .reference.statistics.moe import LayerStatistics, MoEStatistics
from .reference.statistics.table import table as statistics_table
from .reference.weights.cute_dsl import with_cute_dsl
from .reference.weights.cutlass import with_cutlass
from .reference.weights.experts import Experts, assemble_experts, prepare_experts
from .training.layer import fake_quantized_moe

try:
    __version__ = version("nvfp4-moe")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+checkout"

__all__ = [
    "ActivationType",
    "Experts",
    "Explanation",
    "LayerStatistics",
    "MoEStatistics",
    "NVFP44Over6Config",
    "NVFP44Over6ErrMode",
    "QuantizationStatistics",
    "Recipe",
    "Registration",
    "Routing",
    "RoutingMethodType",
    "SfLayout",
    "UnsupportedError",
    "__version__",
    "add_rmsnorm_nvfp4_quantize",
    "assemble_experts",
    "autotune_fused_moe",
    "explain",
    "explain_fused_moe",
    "explain_mm_fp4",
    "fake_quantized_moe",
    "fused_moe",
    "mm_fp4",
    "nvfp4_quantize",
    "prepare_experts",
    "quantization_statistics",
    "register_backend",
    "rmsnorm_nvfp4_quantize",
    "silu_and_mul_nvfp4_quantize",
    "statistics_table",
    "trtllm_fp4_block_scale_moe",
    "trtllm_fp4_block_scale_routed_moe",
    "weight_statistics",
    "with_cute_dsl",
    "with_cutlass",
]
