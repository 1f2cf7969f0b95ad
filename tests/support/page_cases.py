"""Made-up reports for the page's tests."""

# SPDX-License-Identifier: Apache-2.0
from nvfp4_moe.differential.results import Cell, Failure, Heat, Section
from nvfp4_moe.report.data import Report

CODE, SCALE, MOE = "a code is rounded up", "the padded columns are swapped", "a weight is dropped"
"""The faults of `faulty`, as their failures' summaries tell them."""

PAIRS = ("reference = triton", "reference = flashinfer:cuda", "triton = flashinfer:cuda")
WITHHELD = "it adds in pairs, the intervals assume one after another"
SKIPPED = "flashinfer:trtllm: hidden_states are on the CPU"
MACHINE = {
    "versions": {"python": "3.11.7", "torch": "2.13.0", "flashinfer-python": None},
    "gpus": ["NVIDIA B200, sm_100, 178 GiB, CUDA 13.0"],
    "environment": {"FLASHINFER_NVFP4_4OVER6": "1", "XDG_CACHE_HOME": None},
}


def report(*sections: Section) -> Report:
    command = ["nvfp4-moe", "diff", "--report", "a folder"]
    return Report(command, MACHINE, 31.4, list(sections))


def quantization() -> Section:
    """Twelve rows of identical cells, one with a code fault, one with a fault of the layout."""
    section = Section("quantization", list(PAIRS), notes=["of each tensor the first 16 rows"])
    for i in range(12):
        for pair in PAIRS:
            section.put(f"golden {i}, per-token", pair, Cell("identical", 44))
    code = Failure(
        "golden 3, per-token, exact, layout_linear",
        f"3 codes: {CODE}",
        ["first at row 3, block 7, in the step: e2m1 code", "    codes 7f21 block scale 0x7e"],
        replay="failure 1.safetensors",
        upstream="### Rounding of ties\n\n`quantize` differs in 3 codes.",
    )
    tiles = [[128 * (i == 1) * (j > 3) for j in range(24)] for i in range(2)]
    within = [[4 * (i % 4 == 1) + 9 * (j == 5) for j in range(16)] for i in range(32)]
    scale = Failure(
        "layer0.ffn_mid, per-token, fast, layout_128x4",
        f"2,560 block scales: {SCALE}",
        heat=Heat("block scales, layout_128x4", tiles, within),
    )
    section.put("layer0.ffn_in, per-token", PAIRS[0], Cell("different", 268, 3, failures=[code]))
    section.put("layer0.ffn_in, per-token", PAIRS[1], Cell("identical", 268))
    section.put("layer0.ffn_mid, per-token", PAIRS[0], Cell("identical", 11))
    section.put("layer0.ffn_mid, per-token", PAIRS[1], Cell("different", 11, 1, failures=[scale]))
    section.put("layer0.ffn_mid, per-token", PAIRS[2], Cell("skipped", note="no GPU here"))
    return section


def experts() -> Section:
    """Cells of every status that outputs in intervals have, one outside."""
    columns = ["triton", "flashinfer:cutlass", "flashinfer:trtllm"]
    section = Section("fused mixture of experts", columns, notes=["24 tokens, 4 experts, top 2"])
    outside = Failure("Swiglu, bf16", f"192 of 9,216 outputs: {MOE}", ["token 5, column 0"])
    bins = [61, 220, 640, 1310, 1902, 1876, 1290, 655, 214, 57]
    for name in ("Swiglu, per token", "Swiglu, bf16", "Relu2, per token"):
        section.put(name, "flashinfer:trtllm", Cell("skipped", note=SKIPPED))
        section.put(name, "flashinfer:cutlass", Cell("withheld", 1, note=WITHHELD))
        section.put(name, "triton", Cell("inside", 1, note="17.7% single values", histogram=bins))
    section.put(
        "Swiglu, bf16",
        "triton",
        Cell("outside", 1, 1, "error 3.1e-02", [outside], [4000, 300, *bins[2:]]),
    )
    section.put(
        "Relu2, per token",
        "flashinfer:cutlass",
        Cell("crashed", note="the process died: signal 11"),
    )
    return section


def faulty() -> Report:
    """Three faults: of a code, of the layout of block scales, and a fused output."""
    return report(quantization(), experts())
