"""Cases of the fused Triton quantizers, for the interpreter on the CPU and for a GPU."""

# SPDX-License-Identifier: Apache-2.0
import torch
from assertions import assert_bitwise, assert_quantized

from nvfp4_moe.kernels.fused_quantize import launch
from nvfp4_moe.reference import fused_quantize as reference
from nvfp4_moe.reference.quantize import quantize_per_token
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout

RECIPES = (Recipe(), Recipe("exact"), Recipe("fast", NVFP44Over6Config(256, "MSE"), "cute-dsl"))
DTYPES = (torch.bfloat16, torch.float16)
EPS = 1e-5


def matrix(m, k, dtype=torch.bfloat16, seed=0):
    """Rows of every size, a row of zeros and special numbers among them."""
    g = torch.Generator().manual_seed(seed + m + k)
    x = torch.randn(m, k, generator=g) * torch.exp2(torch.randint(-9, 7, (m, 1), generator=g))
    if m > 4:
        x[1] = 0
        x[2, ::5] = -0.0
        x[3, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e4])
        x[4] *= 2.0**-125  # bf16 subnormals among them
    return x.to(dtype)


def silu(x, recipe, layout, device, fused=None):
    columns = x.shape[1] // 2
    want = quantize_per_token(
        reference.silu_and_mul(x, recipe.build), recipe.base_scale_inv, recipe, layout
    )
    got = launch._produce(
        x.to(device),
        columns,
        launch.k.SILU_AND_MUL.value,
        None,
        None,
        0.0,
        recipe.base_scale_inv,
        recipe,
        layout,
        fused,
    )
    assert_quantized(got, want, f"silu {tuple(x.shape)} {x.dtype} {recipe} {layout.name} {fused}")


def norm(x, recipe, layout, device, fused=None, *, add):
    weight = matrix(1, x.shape[1], x.dtype, seed=7)[0]
    residual = matrix(*x.shape, x.dtype, seed=9) if add else None
    given = None if residual is None else residual.clone().to(device)
    if residual is None:
        values = reference.rmsnorm(x, weight, EPS)
    else:
        values, residual = reference.add_rmsnorm(x, residual, weight, EPS)
    want = quantize_per_token(values, recipe.base_scale_inv, recipe, layout)
    kind = launch.k.ADD_RMSNORM if add else launch.k.RMSNORM
    got = launch._produce(
        x.to(device),
        x.shape[1],
        kind.value,
        given,
        weight.to(device),
        EPS,
        recipe.base_scale_inv,
        recipe,
        layout,
        fused,
    )
    what = f"norm {add} {tuple(x.shape)} {x.dtype} {recipe} {layout.name} {fused}"
    assert_quantized(got, want, what)
    if residual is not None:
        assert_bitwise(given.nan_to_num(), residual.nan_to_num(), f"{what}: residual")


def every(x, recipe, layout, device, fused=None):
    silu(torch.cat((x, x.flip(0)), 1), recipe, layout, device, fused)
    for add in (False, True):
        norm(x, recipe, layout, device, fused, add=add)


def every_recipe_and_layout(device):
    for dtype in DTYPES:
        for recipe in RECIPES:
            for layout in SfLayout:
                every(matrix(9, 80, dtype), recipe, layout, device)


def odd_shapes(device):
    for m, k in ((1, 16), (130, 48), (3, 272), (0, 32)):
        for layout in SfLayout:
            every(matrix(m, k), Recipe(), layout, device)


def in_two_launches(device):
    for layout in (SfLayout.layout_linear, SfLayout.layout_128x4):
        every(matrix(7, 96), Recipe(), layout, device, fused=False)


def long_rows(device):
    """Around the longest row that one kernel serves."""
    for k in (2688, 7168, 16384, 16384 + 32):
        every(matrix(2, k), Recipe(), SfLayout.layout_128x4, device)


def every_bf16_number(device):
    """As gate, with up of one: the activation itself, to the bit, of each finite number."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16)
    x = torch.where(x.isfinite(), x, 0).view(128, 512)
    both = torch.cat((x, torch.ones_like(x)), 1).to(device)
    values = torch.empty(128, 512, dtype=torch.bfloat16, device=device)
    launch._launch(
        both, 512, launch.k.SILU_AND_MUL.value, None, None, 0.0, 1.0, Recipe(),
        SfLayout.layout_linear, None, values,
    )  # fmt: skip
    assert_bitwise(values, reference.silu_and_mul(both.cpu()), "silu")


def subnormal_numbers(device):
    """Times infinity they are NaN in the build that takes them for zeros."""
    x = torch.tensor(
        [7e-40, 3.0, torch.inf, 2.0**-126, -7e-40, 1.0, -torch.inf, 0.5] * 4
    ).bfloat16()
    both = torch.cat((x, x.roll(2)))[None]
    for recipe in (Recipe(), Recipe(build="cute-dsl")):
        silu(both, recipe, SfLayout.layout_linear, device)
    kinds = [reference.silu_and_mul(both, build).isnan().sum() for build in ("cuda", "cute-dsl")]
    assert kinds[0] > kinds[1]


def order_of_the_sum(device):
    """An ulp of the sum of squares shows in about one of 2^12 fp16 numbers; here are 2^18."""
    for m, k in ((256, 512), (40, 4112)):
        g = torch.Generator().manual_seed(k)
        x, weight = torch.randn(m, k, generator=g).half(), torch.randn(k, generator=g).half()
        values = torch.empty(m, k, dtype=torch.float16, device=device)
        launch._launch(
            x.to(device), k, launch.k.RMSNORM.value, None, weight.to(device), EPS, 1.0, Recipe(),
            SfLayout.layout_linear, None, values,
        )  # fmt: skip
        assert_bitwise(values, reference.rmsnorm(x, weight, EPS), f"{m} x {k}")


CASES = (
    every_recipe_and_layout,
    odd_shapes,
    in_two_launches,
    long_rows,
    every_bf16_number,
    subnormal_numbers,
    order_of_the_sum,
)
