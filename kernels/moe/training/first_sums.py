"""The first product of a quantized layer, by the GEMM of its forward."""

# SPDX-License-Identifier: Apache-2.0
import torch

from ....reference.moe.hidden_states import Activations
from ....reference.weights.experts import Experts
from ....reference.weights.layout import row_order
from .. import launch
from ..call import padded_activations
from ..hopper.config import RingConfig
from ..permute import permute
from ..tile_table import table_configs

_MOST_ROWS = 128
"""Tiles are chosen as for so many rows of an expert: a Hopper tile of 256 fp32 rows spills registers."""


def first_sums(
    codes: Activations, experts: Experts, ids: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """Multiply the codes of each slot's token by the first weights of its expert.

    Args:
        codes: [T, hidden size / 2], with linear block scales; per-token scales are not read.
        ids: [T, K] int32; another rank's, or -1, has no row.
        rows: [M] int64, the rows of the prepared weights that are wanted.

    Returns:
        [T * K, M] fp32: by expert, then by slot, before any scale of a token or an expert. Rows behind
        those of the last expert are undefined.
    """
    # The bits are those of a server's tiles, which are others, where its sums are batch-invariant.
    slots = min(ids.numel(), _MOST_ROWS * experts.num_local)
    config = table_configs(experts, slots, batch_invariant=True)[0]
    p = permute(ids, experts.num_local, 0, config.bn)
    a = padded_activations(codes, experts.padded_hidden_size)
    place = launch.places(p, config, len(ids), experts.padded_hidden_size)
    x = launch.operand(a, ring=isinstance(config, RingConfig), place=place)
    sums = launch.first_sums(x, experts, p, ids.numel(), ids.shape[1], config)
    return sums.index_select(1, row_order(sums.shape[1], False, ids.device)[rows])
