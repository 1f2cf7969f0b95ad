"""Launch FlashInfer 0.7.4's `rmsnorm_fp4quant` on an H100 or H200, and judge every bit.

    make rmsnorm

It needs torch, safetensors and the folder that `rmsnorm.make` wrote; FlashInfer need not be installed.
Rows of small integers have exact sums, so that the GPU's own rsqrt decides all their bits. For random
rows some rstd near the exact one must give all bits of the row. The outputs are kept in
`arrays.safetensors`. The exit status is 1 if a row differs.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import sys
from pathlib import Path

import torch
from cuda_driver import Driver, with_rows
from rmsnorm.model import matching_rstd, quantized
from safetensors.torch import save_file

from nvfp4_moe.reference.layouts import to_linear
from nvfp4_moe.reference.recipe import SfLayout

EPS = 1e-6
GLOBAL_SCALES = (1.0, 64.0, 2688 / 5)
KINDS = ("integers", "random", "tiny")
ELEMENTS = 16384  # of a case


def draw(hidden: int, dtype: torch.dtype, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [M, hidden] and weight [hidden] on the CPU; M is no multiple of a block's rows."""
    g = torch.Generator().manual_seed(hidden + KINDS.index(kind))
    rows = max(3, ELEMENTS // hidden + 1)
    weight = (torch.rand(hidden, generator=g) + 0.5).to(dtype)
    if kind == "integers":
        return torch.randint(-31, 32, (rows, hidden), generator=g).to(dtype), weight
    x = torch.randn(rows, hidden, generator=g)
    if kind == "tiny":  # eps decides, and block scales round to zero
        x = x * 2.0 ** -torch.randint(0, 14, (rows, hidden // 16), generator=g).repeat_interleave(
            16, 1
        )
        x[::2] *= 2.0**-6
        x[1, :32] = 0
    return x.to(dtype), weight


def launched(
    driver: Driver, module, shape: dict, x: torch.Tensor, weight: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes [M, K / 2] and linear block scales [M, K / 16], uint8 on the CPU."""
    m, hidden = x.shape
    x, weight = x.cuda(), weight.cuda()
    blocks, padded = hidden // 16, -(-m // 128) * 128
    codes = torch.full((m, hidden // 2), 0xAA, dtype=torch.uint8, device="cuda")
    size = (padded * blocks,) if shape["swizzled"] else (m, blocks)
    block_scales = torch.full(size, 0xAA, dtype=torch.uint8, device="cuda")
    global_scale = torch.full((1,), scale, dtype=torch.float32, device="cuda")
    grid = -(-(padded if shape["swizzled"] else m) // shape["rows"])
    driver.launch(
        *(module, shape["entry"], grid, shape["threads"], shape["shared"]),
        *(with_rows(x), weight, with_rows(codes), with_rows(block_scales), global_scale, m, EPS),
    )
    block_scales = block_scales.cpu()
    if shape["swizzled"]:
        swizzled = block_scales.view(padded, blocks)
        block_scales = to_linear(swizzled, m, blocks, SfLayout.layout_128x4)
        everything = to_linear(swizzled, padded, blocks, SfLayout.layout_128x4)
        assert not everything[m:].any(), "the padding of the scales is not zero"
    return codes.cpu(), block_scales.contiguous()


def root(x: torch.Tensor) -> torch.Tensor:
    """Return the GPU's rsqrt of mean + eps, [M] fp32, where sums of squares are exact."""
    mean = x.double().square().mean(1)
    assert (mean.float() == mean).all()
    return torch.rsqrt(mean.float().cuda() + torch.full((), EPS, device="cuda")).cpu()


def main() -> int:
    """Run every shape of the folder that the argument names; return the exit status."""
    parser = argparse.ArgumentParser(description="Run FlashInfer's rmsnorm_fp4quant on sm_90.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    driver, arrays, different = Driver(), {}, 0
    print(torch.cuda.get_device_name(), torch.__version__)
    for shape in json.loads((folder / "index.json").read_text()):
        module = driver.load(folder / f"{shape['name']}.cubin")
        dtype = torch.float16 if shape["fp16"] else torch.bfloat16
        for kind in KINDS:
            x, weight = draw(shape["hidden"], dtype, kind)
            key = f"{shape['name']}/{kind}"
            arrays |= {f"{key}/x": x, f"{key}/weight": weight}
            if kind == "integers":
                arrays[f"{key}/rstd"] = root(x)
            for scale in GLOBAL_SCALES:
                codes, block_scales = launched(driver, module, shape, x, weight, scale)
                arrays[f"{key}/{scale:.3f}/codes"] = codes
                arrays[f"{key}/{scale:.3f}/block_scales"] = block_scales
                if kind == "integers":
                    want = quantized(x, weight, arrays[f"{key}/rstd"], scale)
                    same = (want[0] == codes).all(1) & (want[1] == block_scales).all(1)
                else:
                    same = ~matching_rstd(x, weight, EPS, scale, codes, block_scales).isnan()
                different += int((~same).sum())
                print(
                    f"{key}, global scale {scale:.3f}: {int((~same).sum())} of {len(x)} rows differ"
                )
    save_file(arrays, folder / "arrays.safetensors")
    print(f"FAIL: {different} rows differ" if different else "OK: every row has the model's bits")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
