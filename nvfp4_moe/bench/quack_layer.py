"""The bf16 layer with QuACK's grouped GEMMs, of which the first gathers its rows and computes SwiGLU.

QuACK (quack-kernels on PyPI) runs on sm_90 with the tiles below, which are among those of its own
autotuner; `tune` measures which are fastest for given inputs. The other steps are in `rival_steps.py`.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from .clock import microseconds
from .rival_steps import Groups, grouped, sort, summed


@dataclass(frozen=True)
class Tiles:
    """The tiles of one GEMM."""

    m: int  # permuted rows
    n: int  # rows of weights
    pingpong: bool = False  # two groups of warps take tiles by turns, otherwise one tile together
    cluster_m: int = 2
    cluster_n: int = 1


FIRST = (
    Tiles(256, 128),
    Tiles(256, 192),
    Tiles(128, 256),
    Tiles(128, 128, pingpong=True),
    Tiles(128, 192, pingpong=True),
    Tiles(256, 128, cluster_m=1),
    Tiles(128, 256, cluster_m=1),
    Tiles(128, 128, pingpong=True, cluster_m=1),
    Tiles(128, 192, pingpong=True, cluster_m=1),
)
"""Tiles of the GEMM that gathers, whose clusters share weights alone."""
SECOND = (
    *FIRST,
    Tiles(256, 128, cluster_m=1, cluster_n=2),
    Tiles(128, 256, cluster_m=1, cluster_n=2),
    Tiles(128, 192, pingpong=True, cluster_m=1, cluster_n=2),
)


@dataclass(frozen=True)
class Layer:
    """A layer's weights as QuACK reads them."""

    w13: torch.Tensor  # [E, 2 I, H] bf16, rows gate, up, gate, up ...
    w2: torch.Tensor  # [E, H, I] bf16


def prepare_layer(w13: torch.Tensor, w2: torch.Tensor) -> Layer:
    """Interleave the rows of the first weights.

    Args:
        w13: [E, 2 I, H] bf16, rows [up; gate].
        w2: [E, H, I] bf16.
    """
    up, gate = w13.chunk(2, 1)
    return Layer(torch.stack((gate, up), 2).flatten(1, 2), w2)


def run(
    x: torch.Tensor, logits: torch.Tensor, layer: Layer, top_k: int, tiles: tuple[Tiles, Tiles]
) -> torch.Tensor:
    """Compute the layer, from router logits to the weighted sum.

    Args:
        x: [T, H] bf16.
        logits: [T, E] fp32.
        layer: of `prepare_layer`.
        top_k: experts of a token.
        tiles: of both GEMMs.

    Returns:
        [T, H] bf16.
    """
    s = sort(logits, top_k)
    groups = grouped(s)
    rows = second_gemm(first_gemm(x, layer, groups, tiles[0]), layer, groups, tiles[1])
    return summed(rows, s.permutation.permuted, s.weights)


def first_gemm(x: torch.Tensor, layer: Layer, groups: Groups, tiles: Tiles) -> torch.Tensor:
    """Return [slots, I] bf16 by permuted row: SwiGLU of the gathered rows of x times w13."""
    from quack.gemm_interface import gemm_act

    out = x.new_empty((groups.token.numel(), layer.w2.shape[2]))
    gemm_act(
        x,
        layer.w13.mT,
        activation="swiglu",
        cu_seqlens_m=groups.first,
        A_idx=groups.token,
        postact_out=out,
        store_preact=False,
        tuned=False,
        config=_config(tiles),
    )
    return out


def second_gemm(a: torch.Tensor, layer: Layer, groups: Groups, tiles: Tiles) -> torch.Tensor:
    """Return [slots, H] bf16 by permuted row."""
    from quack.gemm_interface import gemm_tuned

    out = a.new_empty((a.shape[0], layer.w2.shape[1]))
    # `gemm` takes no tiles; the function that its autotuner wraps does.
    gemm_tuned.fn(a, layer.w2.mT, out, cu_seqlens_m=groups.first, config=_config(tiles))
    return out


def _config(tiles: Tiles) -> object:
    from quack.gemm_config import GemmConfig

    return GemmConfig(
        tile_m=tiles.m,
        tile_n=tiles.n,
        pingpong=tiles.pingpong,
        cluster_m=tiles.cluster_m,
        cluster_n=tiles.cluster_n,
        swap_ab=False,
        device_capacity=9,
        is_dynamic_persistent=False,
        use_tma_gather=False,
    )


def tune(x: torch.Tensor, logits: torch.Tensor, layer: Layer, top_k: int) -> tuple[Tiles, Tiles]:
    """Return the fastest tiles of both GEMMs for these inputs, each GEMM measured alone."""
    groups = grouped(sort(logits, top_k))
    first = _fastest(partial(first_gemm, x, layer, groups), FIRST)
    a = first_gemm(x, layer, groups, first)
    return first, _fastest(partial(second_gemm, a, layer, groups), SECOND)


def _fastest(call: Callable[[Tiles], object], tried: tuple[Tiles, ...]) -> Tiles:
    times = [microseconds(partial(call, tiles), calls=1, replays=3) for tiles in tried]
    return tried[times.index(min(times))]
