"""Compares two quantizations of one tensor: how much differs, where first, and from which step on."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import asdict, dataclass

import torch

from ..cases.quantize import Case
from ..reference import quantize
from ..reference.layouts import to_linear
from ..reference.numerics import e4m3
from ..reference.quantize import Quantized
from ..reference.recipe import BLOCK_SIZE


@dataclass(frozen=True)
class Difference:
    """The numbers of different codes and scales of two outputs, and the first place."""

    codes: int
    block_scales: int
    per_token_scales: int
    row: int
    block: int
    step: str
    inputs: str  # the block's elements, in hex
    left: str
    right: str

    def __str__(self) -> str:
        counts = {
            "codes": self.codes,
            "block scales": self.block_scales,
            "per-token scales": self.per_token_scales,
        }
        return ", ".join(f"{n} {what}" for what, n in counts.items() if n)

    def where(self) -> str:
        return (
            f"first at row {self.row}, block {self.block}, in the step: {self.step}\n"
            f"    inputs {self.inputs}\n    {self.left}\n    {self.right}"
        )

    def as_dict(self) -> dict:
        return asdict(self)


def compare(
    x: torch.Tensor, case: Case, left: Quantized, right: Quantized, first_row: int = 0
) -> Difference | None:
    """The difference of two outputs; None if all bits are equal, those of padding scales included."""
    codes = _unequal(left.codes, right.codes)
    scales = _unequal(left.block_scales, right.block_scales)
    if left.per_token_scale is not None and right.per_token_scale is not None:
        tokens = _unequal(
            left.per_token_scale.view(torch.int32), right.per_token_scale.view(torch.int32)
        )
    else:
        tokens = torch.zeros(x.shape[0], dtype=torch.bool, device=codes.device)
    if not (codes.any() or scales.any() or tokens.any()):
        return None
    rows, columns = x.shape[0], x.shape[1] // BLOCK_SIZE
    code_blocks = codes.unflatten(1, (columns, -1)).any(-1)
    scale_blocks = to_linear(scales, rows, columns, case.layout)
    bad = code_blocks | scale_blocks | tokens[:, None]
    counts = (int(codes.sum()), int(scales.sum()), int(tokens.sum()))
    if not bad.any():
        place = "the padding of the block scales"
        return Difference(*counts, rows, columns, place, "", "", "")
    row, block = (int(i) for i in bad.nonzero()[0])
    elements = x[row, block * BLOCK_SIZE :][:BLOCK_SIZE]
    step = _step(
        x, case, left, right, row, block, bool(tokens[row]), bool(scale_blocks[row, block])
    )
    return Difference(
        *counts,
        row + first_row,
        block,
        step,
        _hex(elements),
        _show(left, case, row, block),
        _show(right, case, row, block),
    )


def _unequal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.shape != b.shape:
        raise ValueError(f"outputs of shapes {tuple(a.shape)} and {tuple(b.shape)}")
    return a.cpu() != b.cpu()


def _step(
    x: torch.Tensor,
    case: Case,
    left: Quantized,
    right: Quantized,
    row: int,
    block: int,
    token_differs: bool,
    scale_differs: bool,
) -> str:
    """The first step of the arithmetic in which the two can have parted, by the reference's steps."""
    if token_differs:
        return "per-token scale (from the row's maximum)"
    if not scale_differs:
        return "e2m1 code (element times output scale, rounded)"
    if case.recipe.four_over_six is None:
        return "block scale (rounded to e4m3)"
    steps = run_reference(x[row : row + 1].cpu(), case, keep_steps=True).steps
    unrounded = steps["block_scale"][0, block]
    candidates = {int(e4m3.encode(unrounded)), int(e4m3.encode(unrounded * 1.5))}
    if {_scale_byte(side, case, x, row, block) for side in (left, right)} == candidates:
        errors = (float(steps[f"error_of_{n}"][0, block]) for n in (4, 6))
        return "4over6 choice (reference errors of 4 and 6: {!r}, {!r})".format(*errors)
    return "block scale (rounded to e4m3)"


def run_reference(x: torch.Tensor, case: Case, keep_steps: bool = False) -> Quantized:
    """The reference's output for a case."""
    f = quantize.quantize_per_token if case.per_token else quantize.quantize_global_scale
    return f(x, case.scale(x), case.recipe, case.layout, keep_steps=keep_steps)


def _scale_byte(side: Quantized, case: Case, x: torch.Tensor, row: int, block: int) -> int:
    linear = to_linear(side.block_scales.cpu(), x.shape[0], x.shape[1] // BLOCK_SIZE, case.layout)
    return int(linear[row, block])


def _show(side: Quantized, case: Case, row: int, block: int) -> str:
    codes = side.codes[row, block * 8 : block * 8 + 8].tolist()
    rows, columns = side.codes.shape[0], side.codes.shape[1] * 2 // BLOCK_SIZE
    scale = int(to_linear(side.block_scales.cpu(), rows, columns, case.layout)[row, block])
    text = f"codes {bytes(codes).hex()} block scale 0x{scale:02x}"
    if side.per_token_scale is not None:
        text += f" per-token scale 0x{_hex(side.per_token_scale[row : row + 1])}"
    return text


def _hex(values: torch.Tensor) -> str:
    size = values.element_size()
    raw = values.cpu().contiguous().view(torch.uint8).reshape(-1, size).flip(-1)
    return " ".join(bytes(element.tolist()).hex() for element in raw)
