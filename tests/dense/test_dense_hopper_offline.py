"""The dense GEMM for sm_90 compiles, offline, to overlapping wgmma that stay in registers."""

# SPDX-License-Identifier: Apache-2.0
import re

import pytest
from offline import (
    assembler_log,
    compile_kernel,
    resources,
    tensor_descriptor,
    wgmma_of,
    wgmma_of_widths,
)
from sanitizer import dispatch

from nvfp4_moe.kernels.dense.hopper import CONFIGS, HALVES
from nvfp4_moe.kernels.moe.hopper.config import WIDEST_SHARED, RingConfig, refusal
from nvfp4_moe.kernels.triton_target import shared_memory

ARCH = 90
pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(refusal(ARCH) is not None, reason=str(refusal(ARCH))),
]


def compile_dense(
    config: RingConfig,
    *,
    shared: bool,
    by_row: bool = True,
    out: str = "*bf16",
    even: bool = True,
):
    from nvfp4_moe.kernels.moe.hopper.dense_gemm import dense_gemm_kernel

    constants = {} if shared else {"sums_ptr": None, "ready_ptr": None}
    constants |= {
        "BY_ROW": by_row, "WIDTHS": config.widths, "STAGES": config.stages,
        "GROUPS": config.groups, "ARCH": ARCH,
    }  # fmt: skip
    types = {
        "x_desc": tensor_descriptor("bf16", (config.box, 64), 128),
        "w_desc": tensor_descriptor("i32", (config.rows, 16), 64),
        "sf_desc": tensor_descriptor("i32", (1, 2, 128), 0),
        "alpha_ptr": "*fp32", "out_ptr": out, "sums_ptr": "*fp32", "ready_ptr": "*i32",
        "M": "i32", "N": "i32", "K": "i32",
    }  # fmt: skip
    pointers = [name for name, kind in types.items() if kind[0] == "*" and name not in constants]
    aligned = [*pointers, "K", *(["N"] if even else [])]
    return compile_kernel(
        dense_gemm_kernel, ARCH, types, constants, aligned, num_warps=config.warps,
        maxnreg=config.registers, launch_pdl=True,
    )  # fmt: skip


EVERY = (*CONFIGS, *HALVES)
SHARED = [c for c in EVERY if c.bn <= WIDEST_SHARED]
"""Configurations whose programs may go on with a tile that another one began."""


@pytest.mark.parametrize(
    "config,shared", [(c, False) for c in EVERY] + [(c, True) for c in SHARED], ids=str
)
def test_compiled(config, shared, tmp_path):
    """No warning that wgmma are serialized, nothing in local memory, the multiprocessor shared."""
    kernel = compile_dense(config, shared=shared)
    log = assembler_log(kernel, tmp_path, "sm_90a")
    assert "C75" not in log, log
    used = re.search(r"Used (\d+) registers", log)
    assert used, log
    assert int(used[1]) <= config.registers
    assert resources(kernel, tmp_path) == (0, 0)
    assert dispatch.of(kernel)  # the accesses that racecheck reports, each beside its barriers
    assert wgmma_of(kernel) == wgmma_of_widths(config.widths, config.groups)
    assert "st.global.v4.b32" in kernel.asm["ptx"]  # results leave by 16 bytes
    assert ("atom.global.gpu.release.exch" in kernel.asm["ptx"]) == shared
    # A program leaves the driver 1 KiB of a multiprocessor's 228.
    each = kernel.metadata.shared + 1024
    assert each * config.programs <= (shared_memory(ARCH) + 1) * 1024


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[-1], HALVES[0]], ids=str)
def test_edges(config, tmp_path):
    """An N that 16 does not divide, one alpha, fp16."""
    kernel = compile_dense(config, shared=config in SHARED, by_row=False, out="*fp16", even=False)
    assert "C75" not in assembler_log(kernel, tmp_path, "sm_90a")
    assert resources(kernel, tmp_path) == (0, 0)
