"""Compile FlashInfer 0.7.4's cuTile W4A16 kernels for sm_90, without a GPU, a driver and nvcc.

    make cutile-kernels

The folder in the argument receives a cubin for each kernel of one layer after the routing: both grouped
GEMMs (`fused_moe/cutile/fp4.py:2322`), SwiGLU and the sum over the slots.
"""

# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path
from typing import Any

import cuda.tile as ct
from cuda.tile import compilation
from flashinfer.fused_moe.api import SwiGLU
from flashinfer.fused_moe.cutile import activation, fp4, moe

HIDDEN, INTERMEDIATE = 256, 128
TILE_M, TILE_N, TILE_K = 16, 128, 128
"""FlashInfer's first tile of the grouped GEMMs (`fused_moe/runners.py:3768`), for few tokens."""


def array(dtype: Any, ndim: int) -> compilation.ArrayConstraint:
    """A contiguous array whose rows start at multiples of 16 elements."""
    rows = ndim - 1
    return compilation.ArrayConstraint(
        dtype,
        ndim,
        index_dtype=ct.int32,
        stride_lower_bound_incl=0,
        alias_groups=[],
        may_alias_internally=False,
        stride_constant=[None] * rows + [1],
        stride_divisible_by=[16] * rows + [1],
        shape_divisible_by=16 if rows else 1,
        base_addr_divisible_by=16,
    )


def grouped_gemm(k: int) -> list[Any]:
    """The parameters of the NVFP4 GEMM as FlashInfer launches it on sm_90, without an activation."""
    arrays = [
        array(ct.bfloat16, 1),  # activations
        array(ct.uint8, 3),  # codes
        array(ct.uint8, 3),  # block scales
        array(ct.float32, 1),  # global scales
        *(array(ct.int32, 1) for _ in range(3)),  # slots, experts of blocks, padded slots
        array(ct.bfloat16, 2),  # output
    ]
    scalars = [compilation.ScalarConstraint(ct.int32)] * 4
    sizes = (k, TILE_M, TILE_N, TILE_K, 16)
    flags = (
        False,
        False,
        True,
        False,
    )  # mxfp4, codes multiplied, decoded to bf16, shards of scales
    constants = (*sizes, -1, 0.0, 0.0, 0.0, *flags)
    return [*arrays, *scalars, *map(compilation.ConstantConstraint, constants)]


def kernels() -> dict[str, tuple[Any, list[Any]]]:
    """Each kernel and its parameters, by the name of its file."""
    rows = array(ct.bfloat16, 2)
    swiglu = (*activation._activation_kernel_args(SwiGLU()), INTERMEDIATE, INTERMEDIATE, 1)
    flat = array(ct.bfloat16, 1)
    slots = [flat, array(ct.float32, 1), flat, compilation.ScalarConstraint(ct.int32)]
    tile = moe._combine_tile_h(2, HIDDEN)
    constant = compilation.ConstantConstraint
    return {
        "gemm1": (fp4._grouped_gemm_w4a16, grouped_gemm(HIDDEN)),
        "swiglu": (activation._gated_activation, [rows, rows, *map(constant, swiglu)]),
        "gemm2": (fp4._grouped_gemm_w4a16, grouped_gemm(INTERMEDIATE)),
        "combine": (moe._combine, [*slots, constant(HIDDEN), constant(tile)]),
    }


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    convention = compilation.CallingConvention.cutile_python_v1()
    for name, (kernel, parameters) in kernels().items():
        signature = compilation.KernelSignature(parameters, convention)
        path = folder / f"{name}.cubin"
        compilation.export_kernel(
            kernel, [signature], str(path), gpu_code="sm_90", output_format="cubin"
        )
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
