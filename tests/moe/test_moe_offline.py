"""The grouped GEMM compiles, offline, for each architecture, to the instructions that it is for."""

# SPDX-License-Identifier: Apache-2.0
import pytest
from offline import compile_kernel, resources

from nvfp4_moe.kernels.moe.activation import NONE
from nvfp4_moe.kernels.moe.grouped_gemm import expert_gemm_kernel
from nvfp4_moe.kernels.moe.masked.rows import copy_rows_kernel, masked_rows_kernel
from nvfp4_moe.kernels.moe.tile_table import gemm_config
from nvfp4_moe.kernels.tiles import GemmConfig
from nvfp4_moe.kernels.triton_target import native_mma, shared_memory
from nvfp4_moe.reference.activation import ActivationType

pytestmark = pytest.mark.compile


def configs(native: bool) -> list[GemmConfig]:
    """From the fewest tokens to the most."""
    slots = (8, 4096, 32768, 1 << 20)
    return [gemm_config(n, 128, 2048, native=native) for n in slots]


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_both_gemms_have_the_same_tile(native, batch_invariant):
    """They share a permutation; and with `batch_invariant`, one order of sums."""
    found = set()
    for slots in range(1, 20000, 7):
        configs = [
            gemm_config(slots, 8, columns, native=native, batch_invariant=batch_invariant)
            for columns in (64, 768, 2048, 7168, 16384)
        ]
        assert len({c.bn for c in configs}) == 1
        found |= {(c.bk, c.decoded) for c in configs}
    assert not batch_invariant or len(found) == 1


def compile_gemm(arch: int, config: GemmConfig, activation: int):
    native = native_mma(arch)
    none = ["bias_ptr", "alpha_ptr", "beta_ptr", "limit_ptr"]
    none += [] if native else ["x_sf_ptr"]
    none += ["gate_scale_ptr"] if activation == NONE.value else []
    constants = dict.fromkeys(none) | {
        "X_DIVISOR": 0 if activation == NONE.value else 8,
        "ACT": activation,
        "BM": config.bm,
        "BN": config.bn,
        "BK": config.bk,
        "STAGES": config.stages,
        "EVEN": True,
        "NATIVE": native,
        "ARCH": arch,
    }
    types = {
        "x_ptr": "*u8" if native else "*bf16", "x_sf_ptr": "*u8",
        "w_ptr": "*bf16" if config.decoded else "*u8", "w_sf_ptr": "*u8",
        "token_scale_ptr": "*fp32", "scale_ptr": "*fp32", "gate_scale_ptr": "*fp32",
        "out_ptr": "*bf16", "expanded_ptr": "*i32", "tile_ptr": "*i32",
        "first_expert": "i32", "num_experts": "i32", "M": "i32", "K4": "i32",
    }  # fmt: skip
    aligned = [n for n in types if n not in (*constants, "first_expert", "num_experts")]
    return compile_kernel(
        expert_gemm_kernel,
        arch,
        types,
        constants,
        aligned,
        num_warps=config.warps,
        maxnreg=config.registers,
    )


@pytest.mark.parametrize(
    "arch,instruction",
    [
        (80, "mma.sync.aligned.m16n8k16"),
        (90, "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16"),
        (100, "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale"),
        (103, "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale"),
        (120, "kind::mxf4nvf4.block_scale"),
        (121, "kind::mxf4nvf4.block_scale"),
    ],
)
def test_instructions(arch, instruction, tmp_path):
    if arch == 121 and not native_mma(arch):
        instruction = "mma.sync.aligned.m16n8k16"  # Triton before 3.8 cannot: codes are decoded
    for activation in (int(ActivationType.Swiglu), NONE.value):
        kernel = compile_gemm(arch, configs(native_mma(arch))[0], activation)
        assert instruction in kernel.asm["ptx"]
        stack, _ = resources(kernel, tmp_path)
        assert stack <= 64


@pytest.mark.parametrize("arch", [80, 86, 89, 90])
def test_every_tile_fits_a_multiprocessor(arch):
    """An sm_86 or sm_89 has 99 KiB of shared memory for a program, which decoded weights exceed."""
    for slots in (8, 4096, 32768, 1 << 20):
        for columns in (2048, 7168):
            config = gemm_config(slots, 128, columns, shared=shared_memory(arch))
            kernel = compile_gemm(arch, config, int(ActivationType.Swiglu))
            assert kernel.metadata.shared <= shared_memory(arch) * 1024, config


@pytest.mark.parametrize("arch", [90, 100, 120])
def test_larger_tiles_stay_in_registers(arch, tmp_path):
    for config in configs(native_mma(arch))[1:]:
        kernel = compile_gemm(arch, config, int(ActivationType.Swiglu))
        stack, _ = resources(kernel, tmp_path)
        assert stack <= 64, config


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_masked_input(arch, tmp_path):
    """The two kernels of its own: no local memory, and wide counts as DeepEP's and as torch's."""
    sizes = {"max_m": "i32", "tiles": "i32", "E": "i32"}
    tables = {"row_ptr": "*i32", "tile_ptr": "*i32", "end_ptr": "*i32"}
    constants = {"BINS": 256, "CHUNK": 1024, "TILE": 64, "ARCH": arch}
    for counts in ("*i32", "*i64"):
        types = {"masked_ptr": counts, **tables, **sizes}
        kernel = compile_kernel(masked_rows_kernel, arch, types, constants, list(tables))
        assert resources(kernel, tmp_path) == (0, 0)
    types = {
        "x_ptr": "*bf16",
        "row_index_ptr": "*i32",
        "out_ptr": "*bf16",
        "K4": "i32",
        "P4": "i32",
    }
    for fourths in (False, True):
        constants = {"FOURTHS": fourths, "BLOCK": 1024, "ARCH": arch}
        kernel = compile_kernel(copy_rows_kernel, arch, types, constants, list(types))
        assert resources(kernel, tmp_path) == (0, 0)
