"""The first product of a quantized layer, by the GEMM of its forward."""

# SPDX-License-Identifier: Apache-2.0
import torch

from ....reference.layouts import inverse
from ....reference.moe.hidden_states import Activations
from ....reference.recipe import BLOCK_SIZE
from ....reference.weights.experts import Experts
from ....reference.weights.layout import row_order
from .. import launch
from ..call import padded_columns
from ..hopper.config import RingConfig
from ..permute import permute
from ..tile_table import table_configs

_MOST_ROWS = 128
"""Of an expert, by which tiles are chosen: a Hopper tile of 256 fp32 rows spills registers."""


def first_sums(codes: Activations, experts: Experts, ids: torch.Tensor) -> torch.Tensor:
    """Multiply the codes of each slot's token by the first weights of its expert.

    Args:
        codes: [T, hidden size / 2], with linear block scales; per-token scales are not read.
        ids: [T, K] int32; another rank's, or -1, has no row.

    Returns:
        [T * K, 2 I or I] fp32, without padding: by expert, then by slot, before any scale of a token or
        an expert. Rows behind those of the last expert are undefined.
    """
    assert codes.block_scales is not None
    width, rows = experts.padded_hidden_size, experts.gemm1_weights.shape[1]
    scales = codes.block_scales.view(torch.uint8)
    a = Activations(
        padded_columns(codes.hidden_states, width // 2), padded_columns(scales, width // BLOCK_SIZE)
    )
    # The bits are those of a server's tiles, which are others, where its sums are batch-invariant.
    slots = min(ids.numel(), _MOST_ROWS * experts.num_local)
    config = table_configs(experts, slots, batch_invariant=True)[0]
    ring = isinstance(config, RingConfig)
    p = permute(ids, experts.num_local, 0, config.bn)
    x = launch.operand(a, ring=ring, place=p.permuted if ring else None)
    sums = launch.first_sums(x, experts, p, ids.numel(), ids.shape[1], config)
    return sums.index_select(1, _columns(rows, experts, ids.device))


def _columns(rows: int, experts: Experts, device: torch.device) -> torch.Tensor:
    """Return the column of each natural row of the first weights, without padding."""
    gated, size = experts.activation.gated, experts.intermediate_size
    column = row_order(rows, False, device)[inverse(row_order(rows, gated, device))]
    parts = column.chunk(2 if gated else 1)
    return torch.cat([part[:size] for part in parts])
