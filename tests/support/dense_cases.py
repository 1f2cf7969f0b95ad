"""Cases of the Triton dense product, for the interpreter on the CPU and for a GPU."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass, replace

import torch
from assertions import assert_bitwise, assert_inside

from nvfp4_moe.kernels.dense import launch as dense_launch
from nvfp4_moe.kernels.dense.call import KernelCall
from nvfp4_moe.kernels.moe.hopper.config import RingConfig
from nvfp4_moe.kernels.tiles import GemmConfig
from nvfp4_moe.reference import dense as reference
from nvfp4_moe.reference.bounds.accumulation import CONTIGUOUS
from nvfp4_moe.reference.bounds.dense import mm_fp4_bounds
from nvfp4_moe.reference.layouts import from_linear
from nvfp4_moe.reference.numerics import e2m1
from nvfp4_moe.reference.quantize import quantize_per_token
from nvfp4_moe.reference.recipe import Recipe, SfLayout

NAN = 0x7F  # in e4m3


@dataclass(frozen=True)
class Case:
    """The arguments of a product; codes and block scales are upright, as the kernels take them."""

    a: torch.Tensor  # [M, K/2]
    b_rows: torch.Tensor  # [N, K/2]
    a_scales: torch.Tensor  # in 8x4 with `use_8x4`, else 128x4
    b_scales: torch.Tensor
    alpha: torch.Tensor | None = None
    use_8x4: bool = False
    out_dtype: torch.dtype = torch.bfloat16

    @property
    def arguments(self) -> dict:
        """Those of `nvfp4_moe.mm_fp4`."""
        return {
            "a": self.a,
            "b": self.b_rows.T,
            "a_descale": self.a_scales,
            "b_descale": self.b_scales.T,
            "alpha": self.alpha,
            "out_dtype": self.out_dtype,
            "use_8x4_sf_layout": self.use_8x4,
        }

    def to(self, device) -> "Case":
        a, b, sa, sb = (t.to(device) for t in (self.a, self.b_rows, self.a_scales, self.b_scales))
        alpha = None if self.alpha is None else self.alpha.to(device)
        return Case(a, b, sa, sb, alpha, self.use_8x4, self.out_dtype)


def _coarse_operand(rows: int, k: int, layout: SfLayout, g: torch.Generator):
    codes = torch.randint(0, 16, (rows, k), generator=g)
    codes = torch.where(torch.rand(rows, k, generator=g) < 0.5, codes, 0).to(torch.uint8)
    scales = torch.randint(6, 9, (rows, k // 16), generator=g) * 8  # 2^-1, 1 and 2
    return e2m1.pack(codes), from_linear(scales.to(torch.uint8), layout)


ALPHAS = ("none", "scalar", "0-dim", "rows")


def alpha_of(form: str, m: int, *, exact: bool, seed: int = 0) -> torch.Tensor | None:
    """Powers of two where the product must not round; else any."""
    g = torch.Generator().manual_seed(seed)
    if form == "none":
        return None
    size = m if form == "rows" else 1
    value = torch.exp2(torch.randint(-9, 9, (size,), generator=g).float())
    if not exact:
        value = value * (1 + torch.rand(size, generator=g))
    return value[0] if form == "0-dim" else value


def coarse(m, n, k, *, alpha="rows", use_8x4=False, dtype=torch.bfloat16, seed=0) -> Case:
    """All sixteen codes, scales of 1/2 to 2, alpha of any value: the sums are exact in any order.

    A product is a multiple of 1/16 and at most 144, so that the sum of K <= 4096 has 24 bits.
    """
    assert k <= 4096
    g = torch.Generator().manual_seed(seed + m + n + k)
    layout = reference.a_layout(use_8x4)
    a, a_scales = _coarse_operand(m, k, layout, g)
    b, b_scales = _coarse_operand(n, k, SfLayout.layout_128x4, g)
    factor = alpha_of(alpha, m, exact=False, seed=seed)
    if dtype == torch.float16 and factor is not None:
        factor = factor / 1024
    return Case(a, b, a_scales, b_scales, factor, use_8x4, dtype)


def real(m, n, k, *, use_8x4=False, dtype=torch.bfloat16, seed=0) -> Case:
    """Matrices as they are quantized in serving: alpha is token scale times weight scale.

    Blocks differ by powers of two, so that the terms of a sum do and fp32 cannot hold it.
    """
    g = torch.Generator().manual_seed(seed + m + n + k)

    def matrix(rows: int, deviation: float) -> torch.Tensor:
        spread = torch.exp2(torch.randint(-8, 1, (rows, k // 16, 1), generator=g).float())
        values = torch.randn(rows, k // 16, 16, generator=g) * spread * deviation
        return values.flatten(1).bfloat16()

    x, w = matrix(m, 3.0), matrix(n, k**-0.5)
    recipe, layout = Recipe(), reference.a_layout(use_8x4)
    q = quantize_per_token(x, recipe.base_scale_inv, recipe, layout)
    p = quantize_per_token(w, recipe.base_scale_inv, recipe, SfLayout.layout_128x4)
    assert q.per_token_scale is not None and p.per_token_scale is not None
    alpha = q.per_token_scale * p.per_token_scale.amax()
    return Case(q.codes, p.codes, q.block_scales, p.block_scales, alpha, use_8x4, dtype)


def poisoned(scales: torch.Tensor, rows: int, blocks: int, layout: SfLayout) -> torch.Tensor:
    """Put NaN into every block scale that pads those of [rows, blocks]."""
    live = from_linear(torch.ones(rows, blocks, dtype=torch.uint8), layout)
    return torch.where(live == 1, scales, NAN)


def with_poisoned_padding(case: Case) -> Case:
    """NaN in every block scale that pads: a kernel that reads one shows it."""
    (m, half), n, layout = case.a.shape, case.b_rows.shape[0], reference.a_layout(case.use_8x4)
    return replace(
        case,
        a_scales=poisoned(case.a_scales, m, half // 8, layout),
        b_scales=poisoned(case.b_scales, n, half // 8, SfLayout.layout_128x4),
    )


def output_of(case: Case, device, config: GemmConfig | RingConfig | None = None) -> torch.Tensor:
    """Triton's, into memory that held NaN."""
    c = case.to(device)
    shape = (c.a.shape[0], c.b_rows.shape[0])
    out = torch.full(shape, torch.nan, dtype=c.out_dtype, device=device)
    alpha = None if c.alpha is None else c.alpha.reshape(-1)
    call = KernelCall(c.a, c.b_rows, c.a_scales, c.b_scales, alpha, c.use_8x4)
    dense_launch.mm_fp4(call, out, config)
    return out


def bitwise(
    case: Case, device, config: GemmConfig | RingConfig | None = None, what: str = ""
) -> None:
    """The reference's bits: for sums that are exact."""
    assert_bitwise(output_of(case, device, config), reference.mm_fp4(**case.arguments), what)


def close(
    case: Case, device, config: GemmConfig | RingConfig | None = None, what: str = ""
) -> None:
    """Inside the interval of every implementation that adds contiguous ranges of K."""
    got = output_of(case, device, config)
    bounds = mm_fp4_bounds(**case.to(device).arguments, accumulation=CONTIGUOUS)
    assert_inside(got, bounds, what)


def every_alpha_and_layout(device, config=None):
    for alpha in ALPHAS:
        for use_8x4 in (False, True):
            for dtype in (torch.bfloat16, torch.float16):
                case = coarse(33, 40, 80, alpha=alpha, use_8x4=use_8x4, dtype=dtype)
                bitwise(case, device, config, f"{alpha} {use_8x4} {dtype}")


def odd_shapes(device, config=None):
    """One row, a row more than a tile, and sizes that no tile divides; padding is poisoned."""
    for m, n, k in ((1, 1, 16), (33, 130, 208), (130, 33, 272), (1, 129, 64), (9, 96, 32)):
        for use_8x4 in (False, True):
            case = with_poisoned_padding(coarse(m, n, k, use_8x4=use_8x4))
            bitwise(case, device, config, f"{m} x {n} x {k}, 8x4 {use_8x4}")


def serving_values(device, config=None):
    for m, n, k in ((1, 70, 272), (33, 96, 512), (130, 70, 256)):
        for dtype in (torch.bfloat16, torch.float16):
            case = real(m, n, k, use_8x4=m == 33, dtype=dtype)
            close(case, device, config, f"{m} x {n} x {k} {dtype}")


def special_scales(device, config=None):
    """A NaN block scale makes its row NaN, an infinite product is infinite, alpha 0 gives zeros."""
    case = coarse(20, 24, 64, alpha="rows")
    alpha = case.alpha.clone()
    alpha[3], alpha[4] = 0.0, torch.inf
    scales = case.a_scales.clone()
    scales.view(-1)[5 * 16] = NAN  # row 5, block 0
    case = replace(case, alpha=alpha, a_scales=scales)
    got, want = output_of(case, device, config).cpu(), reference.mm_fp4(**case.arguments)
    assert want[5].isnan().all() and not want[6].isnan().any() and (want[3] == 0).all()
    assert_bitwise(got.isnan(), want.isnan(), "NaN")
    assert_bitwise(got.nan_to_num(nan=1.0), want.nan_to_num(nan=1.0), "the rest")
    huge = replace(coarse(3, 16, 64, dtype=torch.float16), alpha=torch.full((1,), 1e6))
    assert reference.mm_fp4(**huge.arguments).isinf().any()
    bitwise(huge, device, config, "beyond float16")


CASES = (every_alpha_and_layout, odd_shapes, serving_values, special_scales)
