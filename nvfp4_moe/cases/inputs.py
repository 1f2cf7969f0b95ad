"""Inputs to compare quantizers on: seeded synthetic kinds, and what ships with the package."""

# SPDX-License-Identifier: Apache-2.0
import lzma
from importlib.resources import files

import torch
from safetensors.torch import load

from .. import host
from ..reference.numerics import e2m1
from ..reference.numerics.subnormals import kept

KINDS = ("normal", "heavy", "grid", "sparse", "bits", "edge")


@kept
def synthetic(
    kind: str, m: int, k: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> torch.Tensor:
    """Make an [m, k] CPU tensor of bf16, fp16, fp32 or e4m3, the same for the same arguments.

    Kinds: normal; heavy (log-normal tails, each row at a magnitude of its own); grid (values on e2m1
    codes and the ties between them, at powers of two); sparse (5 % non-zero, every third row zero);
    bits (random finite bit patterns, subnormals and -0 included); edge (what the contract treats
    apart: zero and -0 blocks, tiny rows, scales that round to 0, infinities, NaN). Of e4m3: any byte;
    else what is in fp16, with 448 for more.
    """
    rng = torch.Generator().manual_seed(seed)

    if dtype == torch.float8_e4m3fn:
        if kind == "bits":
            return host.integers(rng, 0, 256, (m, k)).to(torch.uint8).view(dtype)
        return synthetic(kind, m, k, torch.float16, seed).clamp(-448, 448).to(dtype)

    def normal(*shape: int) -> torch.Tensor:
        return host.normal(rng, *shape)

    if kind == "normal":
        return normal(m, k).to(dtype)
    if kind == "heavy":
        magnitude = 2 * normal(m, k) + 1.5 * normal(m, 1)
        return (normal(m, k).sign() * magnitude.exp()).clamp(-6e4, 6e4).to(dtype)
    if kind == "grid":
        points = host.fp32(e2m1.VALUES)
        points = torch.cat((points, (points[1:] + points[:-1]) / 2))
        pick = points[host.integers(rng, 0, len(points), (m, k))] * normal(m, k).sign()
        return (pick * host.powers(host.integers(rng, -6, 7, (m, 1)))).to(dtype)
    if kind == "sparse":
        x = normal(m, k) * (host.uniform(rng, m, k) < 0.05)
        x[::3] = 0
        return x.to(dtype)
    if kind == "bits":
        bits = host.integers(rng, -(2**15), 2**15, (m, k)).to(torch.int16)
        x = bits.view(dtype)
        return torch.where(x.isfinite(), x, torch.copysign(torch.ones_like(x), x))
    if kind == "edge":
        return _edge(m, k, dtype, rng)
    raise ValueError(f"kind is {kind!r}; it must be one of {KINDS}")


def _edge(m: int, k: int, dtype: torch.dtype, rng: torch.Generator) -> torch.Tensor:
    """Make rows of ordinary numbers, each with one change of its first block or of the whole row."""
    finfo = torch.finfo(dtype)
    tiny = finfo.smallest_normal
    x = host.normal(rng, m, k).to(dtype)
    first = slice(0, 16)
    for r, row in enumerate(x):
        match r % 20:
            case 0:
                row.zero_()
            case 1:
                row.fill_(-0.0)
            case 2:
                row[first] = 0.0
            case 3:
                row[first] = -0.0
            case 4:
                row[first] *= 1e-4  # its block scale rounds to 0
                row[k - 1] = 300.0
            case 5:
                row[first] *= 2e-6
                row[1] = 0.0
                row[2] = -0.0
                row[k - 1] = 3000.0
            case 6:
                row.mul_(tiny / 4)  # bf16: a row below 3.2e-35; both: subnormals
            case 7:
                row[first] *= tiny / 4
            case 8:
                row[first] *= tiny / 4
                row[16:] = 0.0
            case 9:
                row.mul_(finfo.max / 8)
            case 10:
                row[3] = torch.inf
            case 11:
                row[5] = -torch.inf
                row[first.stop :] = 0.0
            case 12:
                row[7] = torch.nan
            case 13:
                row[first] = torch.nan
            case 14:
                row.fill_(torch.nan)
            case 15:
                row[0] = torch.nan
                row[k - 1] = torch.inf
            case 16:
                row[first] = -tiny / 2
            case 17:
                row.mul_(tiny * 64)
                row[first] = 0.0
            case 18:
                row.fill_(float(row[0]))
            case _:
                row[first] = 464.0 * 6  # on the tie between the two largest e4m3 scales
                row[1::2] *= -1
    return x


def activations() -> dict[str, torch.Tensor]:
    """Load the shipped real activations, bf16, by layer (`data/README.md`).

    `layerN` is MiniLM's on 256 tokens, `smollm2.layerN` that of SmolLM2, a language model, on 24.
    """
    minilm = load((files("nvfp4_moe") / "data" / "minilm_activations.safetensors").read_bytes())
    return minilm | _compressed("smollm2_activations")


def golden(edge: bool = False) -> dict[str, torch.Tensor]:
    """Load outputs of FlashInfer's own CUDA kernels, with their inputs (`data/README.md`)."""
    return _compressed("golden_edge" if edge else "golden")


def _compressed(name: str) -> dict[str, torch.Tensor]:
    path = files("nvfp4_moe") / "data" / f"{name}.safetensors.xz"
    return load(lzma.decompress(path.read_bytes()))
