"""NVFP4 linear layers of a checkpoint, beside its experts: attention, shared experts, dense layers.

Their tensors are those of `formats.py`, below the name of the linear layer:
`model.layers.0.self_attn.q_proj.weight_scale`. The tensors say which layers are quantized. What
checkpoints exclude differs: ModelOpt's lists name `lm_head`, routers (`mlp.gate`) and, in many, all of
`self_attn*`; others quantize attention too.
"""

# SPDX-License-Identifier: Apache-2.0
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..reference.recipe import BLOCK_SIZE
from .check import TensorCheck
from .folder import Folder
from .formats import BIAS, Format
from .locations import Place, read_matrix, read_scalar, read_vector
from .naming import OF_EXPERTS, parse

_ORDINARY = ("BF16", "F16", "F32", "F64", "I64", "I32", "BOOL")
"""The dtypes of tensors that a model reads as they are."""
CACHE_SCALES = ("k_scale", "v_scale")
"""Kinds that a linear layer may have besides: scales of a cache of keys and values in FP8."""


class Tensors(NamedTuple):
    """A linear layer as the checkpoint has it."""

    codes: torch.Tensor  # [N, K/2] uint8
    block_scales: torch.Tensor  # [N, K/16] uint8 e4m3, linear
    decode: torch.Tensor  # [] fp32
    bias: torch.Tensor | None  # [N], of the checkpoint's dtype


@dataclass(frozen=True)
class Linear:
    """An NVFP4 linear layer that was checked, and can be read."""

    folder: Folder
    module: str
    format: Format
    rows: int
    columns: int
    has_bias: bool

    def read(self, device: torch.device | str = "cpu") -> Tensors:
        """Read the tensors to a device."""
        form = self.format
        bias = read_vector(self.folder, self._place(BIAS)).to(device) if self.has_bias else None
        decode = form.decode(read_scalar(self.folder, self._place(form.weight_scale)))
        return Tensors(
            read_matrix(self.folder, self._place(form.codes)).to(device),
            read_matrix(self.folder, self._place(form.block_scales)).view(torch.uint8).to(device),
            decode.to(device),
            bias,
        )

    def _place(self, kind: str) -> Place:
        return Place(f"{self.module}.{kind}")


def quantized_modules(folder: Folder, form: Format) -> dict[str, set[str]]:
    """Return each module, but for experts, that has a quantized tensor or a scale, with its kinds."""
    kinds: dict[str, set[str]] = {}
    found = set()
    scales = {form.block_scales, form.weight_scale, form.input_scale}
    for name in folder.shard_of:
        if parse(name) is not None or OF_EXPERTS.match(name) is not None:
            continue
        module, _, kind = name.rpartition(".")
        kinds.setdefault(module, set()).add(kind)
        info = folder.info(name)
        if kind in scales or (info is not None and info.dtype not in _ORDINARY):
            found.add(module)
    return {module: kinds[module] for module in sorted(found)}


def plan_linear(
    folder: Folder, module: str, kinds: Collection[str], form: Format
) -> tuple[Linear | None, list[str]]:
    """Check the tensors of a quantized module; headers first, then the values of its scales.

    Args:
        kinds: of the module's tensors, as `quantized_modules` returns them.

    Returns:
        The linear layer, or None where it cannot be read; and everything that is wrong.
    """
    codes = f"{module}.{form.codes}"
    info = folder.info(codes) if form.codes in kinds else None
    if info is None or info.dtype != "U8" or len(info.shape) != 2 or not all(info.shape):
        return None, [_no_codes(folder, module, kinds, form)]
    rows, half = info.shape
    columns = half * 2
    check = TensorCheck(folder)
    if columns % BLOCK_SIZE:
        check.add(f"{codes}: it has {columns} columns; they must be a multiple of {BLOCK_SIZE}")
    for kind in (form.block_scales, form.weight_scale):
        if kind not in kinds:
            check.add(f"{module}.{kind}: missing")
    known = (*form.kinds, BIAS, *CACHE_SCALES)
    for kind in sorted(set(kinds) - set(known)):
        check.add(f"{module}.{kind}: extra: the kinds of {form.name} are {', '.join(known)}")
    if form.block_scales in kinds:
        shape = rows, columns // BLOCK_SIZE
        check.block_scales(Place(f"{module}.{form.block_scales}"), [shape])
    if form.weight_scale in kinds:
        check.scalar(Place(f"{module}.{form.weight_scale}"), [(), (1,), (1, 1)], form)
    if BIAS in kinds:
        check.bias(Place(f"{module}.{BIAS}"), [(rows,)])
    return Linear(folder, module, form, rows, columns, BIAS in kinds), check.problems


def _no_codes(folder: Folder, module: str, kinds: Collection[str], form: Format) -> str:
    """Say what a module has in the place of codes."""
    infos = {kind: folder.info(f"{module}.{kind}") for kind in sorted(kinds)}
    sizes = {kind: math.prod(info.shape) for kind, info in infos.items() if info is not None}
    if not sizes:
        return f"{module}: none of its tensors can be read"
    largest = max(sizes, key=lambda kind: (sizes[kind], kind))
    info = infos[largest]
    assert info is not None
    return (
        f"{module}: its weights are not NVFP4, and no other quantization is served: {module}.{largest} "
        f"is {info.dtype} {list(info.shape)}; {form.name} has {form.codes} in U8 [rows, columns / 2]"
    )
