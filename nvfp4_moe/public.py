"""Every public name, from the module that defines it.

The package imports this module when one of the names is first used, because it loads torch. `as` tells
type checkers that a name is public.
"""

# SPDX-License-Identifier: Apache-2.0
from .kernels.backends import Explanation as Explanation
from .kernels.backends import Registration as Registration
from .kernels.backends import UnsupportedError as UnsupportedError
from .kernels.backends import register_backend as register_backend
from .kernels.dense.api import explain_mm_fp4 as explain_mm_fp4
from .kernels.dense.api import mm_fp4 as mm_fp4
from .kernels.fused_quantize.api import add_rmsnorm_nvfp4_quantize as add_rmsnorm_nvfp4_quantize
from .kernels.fused_quantize.api import rmsnorm_nvfp4_quantize as rmsnorm_nvfp4_quantize
from .kernels.fused_quantize.api import silu_and_mul_nvfp4_quantize as silu_and_mul_nvfp4_quantize
from .kernels.moe.api import explain_fused_moe as explain_fused_moe
from .kernels.moe.api import fused_moe as fused_moe
from .kernels.moe.api import trtllm_fp4_block_scale_moe as trtllm_fp4_block_scale_moe
from .kernels.moe.api import trtllm_fp4_block_scale_routed_moe as trtllm_fp4_block_scale_routed_moe
from .kernels.moe.autotune.api import autotune_fused_moe as autotune_fused_moe
from .kernels.moe.masked.api import explain_fused_moe_masked as explain_fused_moe_masked
from .kernels.moe.masked.api import fused_moe_masked as fused_moe_masked
from .kernels.quantize.api import explain as explain
from .kernels.quantize.api import nvfp4_quantize as nvfp4_quantize
from .kernels.quantize.masked import explain_nvfp4_quantize_masked as explain_nvfp4_quantize_masked
from .kernels.quantize.masked import nvfp4_quantize_masked as nvfp4_quantize_masked
from .reference.activation import ActivationType as ActivationType
from .reference.fingerprint import fingerprint as fingerprint
from .reference.moe.routing import Routing as Routing
from .reference.moe.routing import RoutingMethodType as RoutingMethodType
from .reference.recipe import NVFP44Over6Config as NVFP44Over6Config
from .reference.recipe import NVFP44Over6ErrMode as NVFP44Over6ErrMode
from .reference.recipe import Recipe as Recipe
from .reference.recipe import SfLayout as SfLayout
from .reference.statistics.counts import QuantizationStatistics as QuantizationStatistics
from .reference.statistics.counts import statistics_table as statistics_table
from .reference.statistics.measure import quantization_statistics as quantization_statistics
from .reference.statistics.measure import weight_statistics as weight_statistics
from .reference.statistics.moe import LayerStatistics as LayerStatistics
from .reference.statistics.moe import MoEStatistics as MoEStatistics
from .reference.weights.cute_dsl import with_cute_dsl as with_cute_dsl
from .reference.weights.cutlass import with_cutlass as with_cutlass
from .reference.weights.experts import Experts as Experts
from .reference.weights.prepare import assemble_experts as assemble_experts
from .reference.weights.prepare import prepare_experts as prepare_experts
from .training.layer import fake_quantized_moe as fake_quantized_moe
