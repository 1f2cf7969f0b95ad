"""One call of the dense product, checked: what every backend is asked and judged by."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import Any

import torch

from ...reference import checks
from ...reference.dense import a_layout
from ...reference.layouts import padded_shape
from ...reference.recipe import BLOCK_SIZE, SfLayout
from ..device import capability_of

_CODES = (torch.uint8, torch.float4_e2m1fn_x2)
_SCALES = (torch.uint8, torch.float8_e4m3fn)
_OUTPUTS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class KernelCall:
    """The part of a call that kernels read; it crosses `torch.library` (`ops`).

    All tensors are contiguous but `a`. The output [M, N] is given beside it.
    """

    a: torch.Tensor  # [M, K/2] uint8; without `a_scales` [M, K] bf16
    b_rows: torch.Tensor  # [N, K/2] uint8
    a_scales: torch.Tensor | None  # [padded M, padded K/16] uint8, 128x4 or 8x4
    b_scales: torch.Tensor  # [padded N, padded K/16] uint8, 128x4
    alpha: torch.Tensor | None  # [1] or [M] fp32
    use_8x4: bool = False
    batch_invariant: bool = False  # a row's bits depend on no other row

    @property
    def m(self) -> int:
        return self.a.shape[0]

    @property
    def n(self) -> int:
        return self.b_rows.shape[0]

    @property
    def k(self) -> int:
        return self.b_rows.shape[1] * 2

    @property
    def by_row(self) -> bool:
        """One alpha a row."""
        return self.alpha is not None and self.alpha.numel() > 1


@dataclass(frozen=True)
class DenseCall(KernelCall):
    """The arguments of `mm_fp4` or `mm_bf16_fp4`, normalized, made by the functions that check them."""

    out_dtype: torch.dtype = torch.bfloat16
    out: torch.Tensor | None = None  # [M, N], contiguous
    enable_pdl: bool = True
    capability: tuple[int, int] | None = None  # of the GPU asked about; None on the CPU

    def misaligned(self, alignment: int) -> bool:
        """True if a code matrix starts at no multiple of `alignment` bytes within its storage."""
        return any(t.storage_offset() % alignment for t in (self.a, self.b_rows))

    def output(self) -> torch.Tensor:
        """The caller's `out`, or a new one."""
        if self.out is not None:
            return self.out
        return self.a.new_empty((self.m, self.n), dtype=self.out_dtype)


def make_dense_call(
    a: torch.Tensor,
    b: torch.Tensor,
    a_descale: torch.Tensor,
    b_descale: torch.Tensor,
    alpha: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    block_size: int = BLOCK_SIZE,
    use_8x4_sf_layout: bool = False,
    use_nvfp4: bool = True,
    enable_pdl: bool = True,
    batch_invariant: bool = False,
) -> DenseCall:
    """Check what no backend accepts; arguments as of `mm_fp4`.

    Raises:
        ValueError, TypeError: one argument, what was given and what is allowed.
    """
    for name, flag in (
        ("use_nvfp4", use_nvfp4),
        ("use_8x4_sf_layout", use_8x4_sf_layout),
        ("enable_pdl", enable_pdl),
        ("batch_invariant", batch_invariant),
    ):
        checks.flag(name, flag)
    if not use_nvfp4:
        raise ValueError("use_nvfp4 is False; mxfp4 is not served, so it must be True")
    if block_size != BLOCK_SIZE:
        checks.wrong_value("block_size", block_size, f"{BLOCK_SIZE}, the size of NVFP4's blocks")
    checks.tensor("a", a, _CODES, ("M", "K/2"))
    half = a.shape[1]
    if half % (BLOCK_SIZE // 2) or half == 0:
        raise ValueError(
            f"a has K = {2 * half} (its columns, doubled); K must be a positive multiple of {BLOCK_SIZE}"
        )
    _check_b(a, b, half)
    blocks, layout = 2 * half // BLOCK_SIZE, a_layout(use_8x4_sf_layout)
    a_scales = _scales(a, a_descale, "a_descale", a.shape[0], blocks, layout)
    b_scales = _scales(a, b_descale, "b_descale", b.shape[1], blocks, SfLayout.layout_128x4)
    if out_dtype not in _OUTPUTS:
        checks.wrong_value("out_dtype", out_dtype, "torch.bfloat16 or torch.float16")
    _check_out(a, out, (a.shape[0], b.shape[1]), out_dtype)
    return DenseCall(
        _bytes(a),
        _bytes(b).T,
        a_scales,
        b_scales,
        _alpha(a, alpha),
        use_8x4_sf_layout,
        batch_invariant,
        out_dtype,
        out,
        enable_pdl,
        capability_of(a),
    )


def make_bf16_call(
    a: torch.Tensor,
    b: torch.Tensor,
    b_descale: torch.Tensor,
    alpha: torch.Tensor | None = None,
    *,
    batch_invariant: bool = False,
) -> DenseCall:
    """Check what no backend accepts; arguments as of `mm_bf16_fp4`.

    Raises:
        ValueError, TypeError: one argument, what was given and what is allowed.
    """
    checks.flag("batch_invariant", batch_invariant)
    checks.tensor("a", a, (torch.bfloat16,), ("M", "K"))
    k = a.shape[1]
    if k % BLOCK_SIZE or k == 0:
        raise ValueError(f"a has K = {k}; K must be a positive multiple of {BLOCK_SIZE}")
    for name, given in (("a", a), ("alpha", alpha)):
        if isinstance(given, torch.Tensor) and given.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, which this product does not have: call it under "
                "torch.no_grad(), or detach the tensor"
            )
    _check_b(a, b, k // 2)
    layout = SfLayout.layout_128x4
    b_scales = _scales(a, b_descale, "b_descale", b.shape[1], k // BLOCK_SIZE, layout)
    return DenseCall(
        a,
        _bytes(b).T,
        None,
        b_scales,
        _alpha(a, alpha),
        batch_invariant=batch_invariant,
        capability=capability_of(a),
    )


def _check_b(a: torch.Tensor, b: Any, half: int) -> None:
    """Check the codes of b: [K/2, N], column-major, where K/2 is `half`."""
    checks.tensor("b", b, _CODES, ("K/2", "N"))
    if b.shape[0] != half:
        raise ValueError(f"b has {b.shape[0]} rows; it must have a's columns, K/2 = {half}")
    if not b.T.is_contiguous():
        raise ValueError(
            f"b has strides {tuple(b.stride())}; it must be column-major, the transpose of contiguous "
            "codes [N, K/2]"
        )
    _check_device(a, b, "b")


def _bytes(t: torch.Tensor) -> torch.Tensor:
    """View the memory as uint8."""
    if t.dtype == torch.uint8:
        return t
    # A column-major matrix is viewed by its rows, where the elements lie side by side.
    return t.view(torch.uint8) if t.is_contiguous() else t.T.view(torch.uint8).T


def _check_device(a: torch.Tensor, other: torch.Tensor, name: str) -> None:
    if not a.is_meta:  # which `explain_mm_fp4` takes, beside tensors of any device
        checks.same_device(name, other, "a", a)


def _scales(
    a: torch.Tensor, given: Any, name: str, rows: int, blocks: int, layout: SfLayout
) -> torch.Tensor:
    """The block scales as [padded rows, padded K/16] uint8."""
    checks.tensor(name, given, _SCALES)
    shape = padded_shape(rows, blocks, layout)
    transposed = name == "b_descale" and given.dim() == 2
    wanted = f"[{shape[1]}, {shape[0]}], a transpose" if name == "b_descale" else f"{list(shape)}"
    upright = given.T if transposed else given
    if given.numel() != shape[0] * shape[1] or not upright.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(given.shape)} and strides {tuple(given.stride())}; the scales of "
            f"{rows} rows of {blocks} blocks in {layout.name} must be contiguous, {wanted}"
        )
    _check_device(a, given, name)
    return upright.view(torch.uint8).reshape(shape)


def _alpha(a: torch.Tensor, alpha: Any) -> torch.Tensor | None:
    if alpha is None:
        return None
    checks.tensor("alpha", alpha, (torch.float32,))
    if alpha.numel() not in (1, a.shape[0]):
        checks.wrong_value(
            "alpha", alpha, f"a tensor of float32 of one element, or of one a row ({a.shape[0]})"
        )
    _check_device(a, alpha, "alpha")
    return alpha.reshape(-1).contiguous()


def _check_out(a: torch.Tensor, out: Any, shape: tuple[int, int], out_dtype: torch.dtype) -> None:
    if out is None:
        return
    checks.tensor("out", out, (out_dtype,), shape, contiguous=True)
    _check_device(a, out, "out")
