"""The quantizers against FlashInfer's CUDA kernels, and against its CuTe-DSL kernels."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

import numpy as np
import torch

from nvfp4_moe.reference.fused_quantize import silu_and_mul
from nvfp4_moe.reference.layouts import from_linear, to_linear
from nvfp4_moe.reference.recipe import BLOCK_SIZE, SfLayout

from . import inputs
from .cases import LAYOUTS, Golden, Outcome, compared, recipe_of, tensor
from .draw import Array, integers
from .implementations import Implementation
from .inputs import Case

CUDA, CUTE_DSL = "quant/{}/sf", "dsl/{}/q"
CUTE_DSL_BIT = 64
EXPERT_ROWS = (40, 17, 0)
EXPERT_SCALES = (300.0, 2688.0, 1.0)
UNTOUCHED = 0xAA
"""The byte in the memory of codes before the kernels ran."""


def compare(
    golden: Golden, ours: Implementation, every: int = 1, most_rows: int = 1 << 20
) -> Iterator[Outcome]:
    for c in golden.cases("quantize", CUDA, every):
        if c["M"] > most_rows:
            continue
        by_operation = {
            "global": _global,
            "token": _per_token,
            "experts": _experts,
            "interleave": _interleave,
        }
        yield from by_operation[c["op"]](golden, ours, c)
    for c in golden.cases("cute-dsl", CUTE_DSL, every):
        yield from _cute_dsl(golden, ours, c)


def _group(c: Case, what: str) -> str:
    four = " 4over6" if c["code"] else ""
    return f"quantize, {what}, {c['dt']}, {'exact' if c['exact'] else 'fast'}{four}"


def _global(golden: Golden, ours: Implementation, c: Case) -> Iterator[Outcome]:
    bits = inputs.matrix(c, (c["M"], c["K"]), golden.seed)
    scale = inputs.global_scale(c, inputs.values(bits, c["dt"]), golden.seed)
    layout = LAYOUTS[c["layout"]]
    codes, scales = ours.global_scale(
        tensor(bits, c["dt"]).to(ours.device),
        torch.from_numpy(scale).to(ours.device),
        recipe_of(c),
        layout,
        c["inverse"],
    )
    group = _group(c, "by row" if c["rowwise"] else "global scale")
    want, want_scales = (golden.arrays[f"quant/{c['name']}/{part}"] for part in ("q", "sf"))
    if c.get("keep"):
        rows = torch.from_numpy(np.unique(np.linspace(0, c["M"] - 1, c["keep"]).astype(int)))
        codes = codes.cpu()[rows]
        if layout == SfLayout.layout_linear:
            scales = scales.cpu()[rows]
    yield compared(group, c["name"] + " codes", codes, want)
    yield compared(group, c["name"] + " scales", scales, want_scales)


def _per_token(golden: Golden, ours: Implementation, c: Case) -> Iterator[Outcome]:
    """Rows that the index does not name stay as the memory was; ours are zero."""
    x = tensor(inputs.matrix(c, (c["M"], c["K"]), golden.seed), c["dt"])
    index = inputs.row_index(c, golden.seed)
    codes, scales, token = (
        t.cpu()
        for t in ours.per_token(
            x.to(ours.device),
            recipe_of(c),
            LAYOUTS[c["layout"]],
            torch.from_numpy(index).to(ours.device),
            None,
        )
    )
    named = np.isin(np.arange(c["M"]), index)
    want = {part: golden.arrays[f"quant/{c['name']}/{part}"] for part in ("q", "sf", "scale")}
    group, name = _group(c, "per token by index"), c["name"]
    yield compared(group, name + " codes", codes[named], want["q"][named])
    yield compared(group, name + " scales", scales, want["sf"])
    yield compared(group, name + " token scales", token[named], want["scale"][named])
    yield _untouched(group, name, want["q"][~named])


def _experts(golden: Golden, ours: Implementation, c: Case) -> Iterator[Outcome]:
    """Three experts' rows under a mask, with and without SiLU before; scales in 128x4."""
    m, columns = c["M"] // len(EXPERT_ROWS), c["K"] // BLOCK_SIZE
    width = c["K"] * (2 if c["silu"] else 1)
    x = tensor(inputs.matrix(c, (c["M"], width), golden.seed), c["dt"])
    x = x.view(len(EXPERT_ROWS), m, width)
    all_codes = golden.arrays[f"quant/{c['name']}/q"].reshape(len(EXPERT_ROWS), m, -1)
    all_scales = golden.arrays[f"quant/{c['name']}/sf"].reshape(len(EXPERT_ROWS), 128, -1)
    group = _group(c, "experts, SiLU" if c["silu"] else "experts")
    for e, (rows, scale) in enumerate(zip(EXPERT_ROWS, EXPERT_SCALES, strict=True)):
        values = silu_and_mul(x[e]) if c["silu"] else x[e]
        codes, scales = ours.global_scale(
            values.to(ours.device),
            torch.tensor([scale], dtype=torch.float32, device=ours.device),
            recipe_of(c),
            SfLayout.layout_linear,
            False,
        )
        want = to_linear(
            torch.from_numpy(all_scales[e].copy()), m, columns, SfLayout.layout_128x4
        ).numpy()
        name = f"{c['name']} expert {e}"
        yield compared(group, name + " codes", codes[:rows], all_codes[e, :rows])
        yield compared(group, name + " scales", scales[:rows], want[:rows])
        yield _untouched(group, name, all_codes[e, rows:])


def _interleave(golden: Golden, _: Implementation, c: Case) -> Iterator[Outcome]:
    shape = c["M"], c["K"]
    scales = integers(golden.seed, (c["name"], "i"), shape, 256).astype(np.uint8)
    got = from_linear(torch.from_numpy(scales), SfLayout.layout_128x4)
    yield compared("block_scale_interleave", c["name"], got, golden.arrays[CUDA.format(c["name"])])


def _cute_dsl(golden: Golden, ours: Implementation, c: Case) -> Iterator[Outcome]:
    silu = c.get("silu", False)
    x = tensor(inputs.matrix(c, (c["M"], c["K"] * (2 if silu else 1)), golden.seed), c["dt"])
    x = (silu_and_mul(x, "cute-dsl") if silu else x).to(ours.device)
    recipe, layout = recipe_of(c, CUTE_DSL_BIT), LAYOUTS[c["layout"]]
    key, group = f"dsl/{c['name']}", "CuTe-DSL, " + _group(c, c["op"])
    if c["op"] == "token":
        fold = None
        if c.get("fold"):
            fold = torch.full((1,), 0.37, dtype=torch.float32, device=ours.device)
        parts = ours.per_token(x, recipe, layout, None, fold)
    else:
        scale = torch.from_numpy(golden.arrays[key + "/gs"].copy()).to(ours.device)
        parts = ours.global_scale(x, scale, recipe, layout, False)
    for part, got in zip(("q", "sf", "scale"), parts, strict=False):
        yield compared(group, f"{c['name']} {part}", got, golden.arrays[f"{key}/{part}"])


def _untouched(group: str, name: str, codes: Array) -> Outcome:
    """A measured fact that the comparison relies on."""
    return Outcome(group, name + " others", codes.size, int((codes != UNTOUCHED).sum()))
