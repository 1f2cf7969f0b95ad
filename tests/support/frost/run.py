"""Launch FlashInfer 0.7.4's Frost kernels on an H100 or H200, and judge every output.

    make frost

It needs torch and the folder that `frost.make` wrote. The CUDA driver loads the kernels; FlashInfer
need not be installed. The exit status is 1 if an output lies outside its interval.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import ctypes
import json
import sys
from pathlib import Path

import torch
from cuda_driver import Driver
from frost.intervals import bounds, decode

SEEDS = 4
SHARED = 1024  # bytes


def draw(shape: dict, exact: bool, seed: int) -> tuple[torch.Tensor, ...]:
    """Return a layer's inputs on the CPU; with `exact`, small integers, so that few sums round.

    They are x, then codes, block scales and expert scales of FC1 and of FC2, then ids and weights.
    """
    g = torch.Generator().manual_seed(seed)
    tokens, hidden, inner = shape["tokens"], shape["hidden"], shape["inner"]
    experts, top_k, branches = shape["experts"], shape["top_k"], 2 if shape["gated"] else 1

    def codes(*size: int) -> torch.Tensor:
        if not exact:
            return torch.randint(0, 256, size, dtype=torch.uint8, generator=g)
        one = torch.randint(0, 2, (*size[:-1], size[-1] * 2), generator=g) * 8 + 2  # +1 or -1
        kept = torch.where(torch.rand(one.shape, generator=g) < 0.1, one, 0).to(torch.uint8)
        return kept[..., ::2] | kept[..., 1::2] << 4

    def block_scales(*size: int) -> torch.Tensor:
        if exact:
            return torch.full(size, 0x38, dtype=torch.uint8, device="cpu")  # 1
        return torch.randint(0x28, 0x40, size, dtype=torch.uint8, generator=g)

    if exact:
        x = torch.randint(-1, 2, (tokens, hidden), generator=g).bfloat16()
        scales1, scales2 = torch.ones(experts, branches), torch.ones(experts)
    else:
        x = torch.randn(tokens, hidden, generator=g).bfloat16()
        scales1 = torch.rand(experts, branches, generator=g) * 2 * hidden**-0.5 / 4
        scales2 = torch.rand(experts, generator=g) * inner**-0.5
    ids = torch.stack([torch.randperm(experts, generator=g)[:top_k] for _ in range(tokens)]).int()
    if exact:
        weights = 2.0 ** -torch.arange(top_k).expand(tokens, -1).float()
    else:
        weights = torch.rand(tokens, top_k, generator=g)
    w1 = codes(experts, branches * inner, hidden // 2)
    s1 = block_scales(experts, branches * inner, hidden // 16)
    w2 = codes(experts, hidden, inner // 2)
    s2 = block_scales(experts, hidden, inner // 16)
    return x, w1, s1, scales1, w2, s2, scales2, ids, weights.contiguous()


def outputs(
    driver: Driver, module: ctypes.c_void_p, shape: dict, given: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Launch FC1 and FC2 as FlashInfer does; what a kernel does not write stays NaN."""
    x, w1, s1, scales1, w2, s2, scales2, ids, weights = (tensor.cuda() for tensor in given)
    rows = shape["tokens"] * shape["top_k"]
    middle = torch.full((rows, shape["inner"]), torch.nan, dtype=torch.bfloat16, device="cuda")
    out = torch.full_like(x, torch.nan)
    first = (module, shape["fc1"], shape["grid1"], 256, SHARED)
    driver.launch(*first, x, w1, ids, middle, scales1, s1)
    second = (module, shape["fc2"], shape["grid2"], 32 * shape["top_k"], SHARED)
    driver.launch(*second, middle, w2, ids, weights, out, scales2, s2)
    return out.cpu().double()


def intervals(shape: dict, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bounds [tokens, hidden] of a layer's outputs, in fp64."""
    x, w1, s1, scales1, w2, s2, scales2, ids, weights = given
    first, second = decode(w1, s1), decode(w2, s2)
    scales = scales1.double(), scales2.double()
    return bounds(
        *(x.double(), first, scales[0], second, scales[1], ids, weights.double(), shape["gated"])
    )


def main() -> int:
    """Run every shape of the folder that the argument names; return the exit status."""
    parser = argparse.ArgumentParser(description="Run FlashInfer's Frost kernels on sm_90.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    print(torch.cuda.get_device_name(), torch.__version__)
    driver, outside = Driver(), 0
    for shape in json.loads((folder / "index.json").read_text()):
        module = driver.load(folder / f"{shape['name']}.cubin")
        for exact in (True, False) if shape["name"] == "relu2" else (False,):
            for seed in range(SEEDS):
                given = draw(shape, exact, seed)
                low, high = intervals(shape, given)
                got = outputs(driver, module, shape, given)
                wrong = int((~((low <= got) & (got <= high))).sum())
                outside += wrong
                print(
                    f"{shape['name']:7} exact={exact} seed={seed}: {wrong} of {got.numel()} outside,"
                    f" {(low == high).double().mean():.1%} have one value,"
                    f" largest {got.abs().max():.3g}"
                )
    print(f"FAIL: {outside} outside" if outside else "OK: FlashInfer's Frost keeps its contract")
    return int(outside > 0)


if __name__ == "__main__":
    sys.exit(main())
