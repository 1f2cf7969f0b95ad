"""The grouped GEMM for sm_90 compiles, offline, to overlapping wgmma that stay in registers."""

# SPDX-License-Identifier: Apache-2.0
import re
from dataclasses import replace

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

from nvfp4_moe.kernels.moe.activation import NONE
from nvfp4_moe.kernels.moe.hopper.config import CONFIGS, RingConfig, refusal, ring_config
from nvfp4_moe.kernels.triton_target import shared_memory
from nvfp4_moe.reference.activation import ActivationType

pytestmark = pytest.mark.compile

ARCH = 90
SWIGLU = int(ActivationType.Swiglu)
serves = pytest.mark.skipif(refusal(ARCH) is not None, reason=str(refusal(ARCH)))


def test_other_gpus_are_refused():
    for arch in (80, 89, 100, 120):
        assert f"sm_{arch}" in refusal(arch)


def test_the_table_has_every_configuration():
    """Each is chosen for some count of rows, and a wider one for more rows."""
    chosen = [ring_config(slots, 8) for slots in range(1, 8192)]
    assert set(chosen) == set(CONFIGS)
    assert [c.bn for c in chosen] == sorted(c.bn for c in chosen)


def compile_ring(config: RingConfig, activation: int, *, biased: bool = False, odd: bool = False):
    from nvfp4_moe.kernels.moe.hopper.grouped_gemm import expert_gemm_kernel

    none = [] if biased else ["bias_ptr", "alpha_ptr", "beta_ptr", "limit_ptr"]
    if activation == NONE.value:
        none += ["gate_scale_ptr", "alpha_ptr", "beta_ptr", "limit_ptr"]
    constants = dict.fromkeys(none) | {
        "GATHERED": config.gathers, "ACT": activation, "FRAGMENTS": odd, "ODD": odd,
        "WIDTHS": config.widths, "STAGES": config.stages, "GROUPS": config.groups, "AHEAD": config.ahead,
        "ARCH": ARCH,
    }  # fmt: skip
    floats = (
        "token_scale_ptr", "bias_ptr", "scale_ptr", "gate_scale_ptr", "alpha_ptr", "beta_ptr",
        "limit_ptr",
    )  # fmt: skip
    types = dict.fromkeys(floats, "*fp32") | {
        "x_desc": tensor_descriptor("bf16", (config.box, 64), 128),
        "w_desc": tensor_descriptor("i32", (128, 16), 64),
        "sf_desc": tensor_descriptor("i32", (1, 2, 128), 0),
        "x_ptr": "*bf16", "out_ptr": "*bf16", "expanded_ptr": "*i32", "tile_ptr": "*i32",
        "slots": "i32", "top_k": "i32", "strips": "i32", "M": "i32", "K": "i32",
    }  # fmt: skip
    aligned = [n for n in types if n not in constants and (n.endswith("_ptr") or n in "MK")]
    return compile_kernel(
        expert_gemm_kernel, ARCH, types, constants, aligned, num_warps=8,
        maxnreg=config.registers, launch_pdl=True,
    )  # fmt: skip


QUICK = CONFIGS[1]
"""Its kernels compile in 20 s; those of the others take up to a minute each, and are slow tests."""


@serves
@pytest.mark.parametrize(
    "activation,odd,gathers",
    [
        (SWIGLU, False, False),
        (SWIGLU, True, False),
        (NONE.value, False, False),
        (SWIGLU, False, True),
        (SWIGLU, True, True),
    ],
    ids=["first", "first-in-fragments", "second", "gathered", "gathered-in-fragments"],
)
@pytest.mark.parametrize(
    "config",
    [pytest.param(c, marks=() if c == QUICK else pytest.mark.slow) for c in CONFIGS],
    ids=str,
)
def test_compiled(config, activation, odd, gathers, tmp_path):
    """No warning that wgmma are serialized, nothing in local memory, the multiprocessor shared."""
    config = replace(config, gathers=gathers)
    kernel = compile_ring(config, activation, biased=True, odd=odd)
    log = assembler_log(kernel, tmp_path, "sm_90a")
    assert "C75" not in log, log
    used = re.search(r"Used (\d+) registers", log)
    assert used, log
    assert int(used[1]) <= config.registers
    assert resources(kernel, tmp_path) == (0, 0)
    assert dispatch.of(kernel)  # the accesses that racecheck reports, each beside its barriers
    # Each turn of a loop over K releases the stage before it, which the loop has to carry.
    released = re.findall(r"memdesc_index %empty\[(%(?!c\d)[\w#]+)\]", kernel.asm["ttgir"])
    assert len(released) == 2 * len(config.widths)
    assert not any(name.startswith("%stage") for name in released), released
    assert wgmma_of(kernel) == wgmma_of_widths(config.widths, config.groups)
    # Each partition loads a tile's record at once: one before its loop over tiles, one in it.
    assert kernel.asm["ptx"].count("ld.global.v4.b32") == 2 * (2 + 3 * gathers)
    # Codes that are loaded before the first product.
    before = kernel.asm["ttgir"].partition("warp_group_dot")[0]
    loads = re.findall(r"local_load .*-> tensor<128x16xi32", before)
    assert len(loads) == (config.groups if config.ahead else 1)
    # Rows that were copied, not brought by TMA, are behind a fence in each loop over K; the barriers'
    # initialization is behind one, too.
    fences = kernel.asm["ptx"].count("fence.proxy.async.shared::cta")
    assert fences == 1 + gathers * len(config.widths)
    # A lane copies 16 bytes of each of its rows: 32 lanes a fourth of eight rows of 128 columns.
    copies = re.findall(r"cp\.async\.c[ag]\.\S+ .*?0x10,", kernel.asm["ptx"])
    assert len(copies) == gathers * sum(config.widths) // 2 * config.groups
    assert ("cp.async.mbarrier.arrive.noinc" in kernel.asm["ptx"]) == gathers
    # A program leaves the driver 1 KiB of a multiprocessor's 228.
    each = kernel.metadata.shared + 1024
    assert each * config.programs <= (shared_memory(ARCH) + 1) * 1024
