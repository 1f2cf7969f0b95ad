"""The dense GEMM compiles, offline, for each architecture, to the instructions that it is for."""

# SPDX-License-Identifier: Apache-2.0
import pytest
from offline import compile_kernel, resources

from nvfp4_moe.kernels.dense.kernel import dense_gemm_kernel
from nvfp4_moe.kernels.dense.launch import dense_config
from nvfp4_moe.kernels.jit.decode import decode_kernel
from nvfp4_moe.kernels.tiles import GemmConfig
from nvfp4_moe.kernels.triton_target import native_mma, shared_memory
from nvfp4_moe.reference.recipe import SfLayout

pytestmark = pytest.mark.compile

ARCHITECTURES = (80, 89, 90, 100, 120)
INSTRUCTIONS = {
    80: "mma.sync.aligned.m16n8k16",
    89: "mma.sync.aligned.m16n8k16",
    90: "wgmma.mma_async.sync.aligned.m64n",
    100: "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale",
    120: "kind::mxf4nvf4.block_scale",
}


def shipped(arch: int) -> list[GemmConfig]:
    """Every configuration, once, from the fewest rows to the most."""
    return list(
        dict.fromkeys(
            dense_config(m, n, k, arch)
            for m in (1, 16, 17, 33, 64, 128, 513, 1024, 8192)
            for n in (4096, 18432)
            for k in (2048, 7168)
        )
    )


def compile_dense(
    arch: int,
    config: GemmConfig,
    *,
    even: bool = True,
    by_row: bool = True,
    x_tile: int = 128,
    out: str = "*bf16",
):
    native = native_mma(arch)
    none = [] if native else ["x_sf_ptr"]
    none += ["w_sf_ptr"] if config.decoded else []
    constants = dict.fromkeys(none) | {
        "BY_ROW": by_row,
        "X_TILE": x_tile,
        "BM": config.bm,
        "BN": config.bn,
        "BK": config.bk,
        "STAGES": config.stages,
        "EVEN": even,
        "NATIVE": native,
        "ARCH": arch,
    }
    types = {
        "x_ptr": "*u8" if native else "*bf16",
        "x_sf_ptr": "*u8",
        "w_ptr": "*bf16" if config.decoded else "*u8",
        "w_sf_ptr": "*u8",
        "alpha_ptr": "*fp32",
        "out_ptr": out,
        "M": "i32",
        "N": "i32",
        "K4": "i32",
        "sf_tiles": "i32",
    }
    aligned = [
        n for n in types if n not in (*constants, "M", "sf_tiles", *([] if even else ["K4"]))
    ]
    return compile_kernel(
        dense_gemm_kernel,
        arch,
        types,
        constants,
        aligned,
        num_warps=config.warps,
        maxnreg=config.registers,
    )


def test_the_table_has_every_kind():
    below, native = shipped(90), shipped(100)
    assert [c.decoded for c in below].count(True) == 1 and len(below) == 6
    assert len(native) == 3 and not any(c.decoded for c in native)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_configuration(arch, tmp_path):
    """The MMA that it is for, shared memory that there is, and nothing spilled to local memory."""
    for config in shipped(arch):
        kernel = compile_dense(arch, config)
        assert INSTRUCTIONS[arch] in kernel.asm["ptx"], config
        assert kernel.metadata.shared <= shared_memory(arch) << 10, config
        stack, spills = resources(kernel, tmp_path)
        assert spills == 0 and stack <= 64, f"{config}: stack {stack}, {spills} spills"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_edges(arch, tmp_path):
    """A K that BK does not divide, 8x4 scales, one alpha, fp16: all of them stay in registers."""
    config = shipped(arch)[0]
    kernel = compile_dense(arch, config, even=False, by_row=False, x_tile=8, out="*fp16")
    assert INSTRUCTIONS[arch] in kernel.asm["ptx"]
    assert resources(kernel, tmp_path)[1] == 0


@pytest.mark.parametrize("arch", [80, 90])  # where codes are decoded
@pytest.mark.parametrize("operand", [False, True])
@pytest.mark.parametrize("some_rows", [False, True])
@pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
def test_decoding(arch, layout, operand, some_rows, tmp_path):
    constants = {} if some_rows else {"row_index_ptr": None}
    constants |= {
        "place_ptr": None, "token_ptr": None, "placed_token_ptr": None, "OPERAND": operand,
        "LAYOUT": int(layout), "BLOCKS": 64, "FRAGMENTS": False, "SLOTS": 0, "ARCH": arch,
    }  # fmt: skip
    types = {
        "codes_ptr": "*u16",
        "sf_ptr": "*u8",
        "row_index_ptr": "*i32",
        "out_ptr": "*bf16",
        "R": "i32",
        "NB": "i32",
        "padded": "i32",
        "sf_columns": "i32",
    }
    aligned = ("codes_ptr", "sf_ptr", "out_ptr", "NB", "padded", "sf_columns")
    kernel = compile_kernel(decode_kernel, arch, types, constants, aligned, num_warps=4)
    assert resources(kernel, tmp_path) == (0, 0)
