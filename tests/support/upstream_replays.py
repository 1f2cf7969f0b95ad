"""Replay files of the first two reports of `docs/upstream_reports.md`, for a Blackwell GPU.

    python3 tests/support/upstream_replays.py FOLDER

Each holds the inputs of a call of FlashInfer's TRT-LLM layer of which one output alone is right. No
output is recorded: FlashInfer's routing kernels ran on an H200, and its layer does not run there.
"""

# SPDX-License-Identifier: Apache-2.0
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from nvfp4_moe import host
from nvfp4_moe.cases.moe_case import MoECase
from nvfp4_moe.failures.replay_file import MoEFailure, Origin, save_moe
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.moe.hidden_states import Activations
from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType
from nvfp4_moe.reference.numerics import e2m1
from nvfp4_moe.reference.recipe import BLOCK_SIZE
from nvfp4_moe.reference.weights.prepare import assemble_experts

HIDDEN, INTERMEDIATE = 256, 128
BACKEND = "flashinfer:trtllm"
NOTE = "not run: no GPU that FlashInfer's layer serves was at hand. An H200 ran its routing kernel on {}"


def _first_column_one(*size: int) -> torch.Tensor:
    """Packed codes of zeros, with 1 in the first column."""
    value = host.zeros(*size)
    value[..., 0] = 1.0
    return e2m1.pack(e2m1.encode(value))


def _ones(*size: int) -> torch.Tensor:
    return torch.full(size, 0x38, dtype=torch.uint8, device="cpu")  # 1 in e4m3


def layer(
    name: str,
    local: int,
    routing: Routing,
    logits: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> MoECase:
    """A call of one token, in which every column of expert e's row is 2^e.

    A row is one product, rounded to bf16, so that its last bits in fp32 do not matter. With eight
    weights of 1/8, as FlashInfer's approximate instructions give them, too, the output is exact.
    """
    experts = assemble_experts(
        _first_column_one(local, INTERMEDIATE, HIDDEN),
        _ones(local, INTERMEDIATE, HIDDEN // BLOCK_SIZE),
        host.full((local,), 1.0),
        _first_column_one(local, HIDDEN, INTERMEDIATE),
        _ones(local, HIDDEN, INTERMEDIATE // BLOCK_SIZE),
        host.powers(host.arange(local)),
        ActivationType.Identity,
    )
    scales = _ones(1, HIDDEN // BLOCK_SIZE).view(torch.float8_e4m3fn)
    states = Activations(_first_column_one(1, HIDDEN), scales, host.full((1,), 1.0))
    return MoECase(
        name,
        states,
        experts,
        routing,
        logits.shape[1],
        logits=logits,
        routing_bias=bias,
        exact=True,
    )


def repeated_experts() -> MoEFailure:
    """Report 1: a bias of -inf leaves experts 0 to 8, all of the first of eight groups."""
    bias = host.full((256,), -torch.inf)
    bias[:9] = host.arange(9) / 64
    case = layer(
        "report 1, experts taken several times",
        16,
        Routing(RoutingMethodType.DeepSeekV3, 8, 8, 4, 1.0),
        host.zeros(1, 256),
        bias,
    )
    note = NOTE.format("such rows (golden case 0856): it took experts several times in each of 406")
    return MoEFailure(case, BACKEND, None, origin=Origin("report 1", note=note))


def no_experts() -> MoEFailure:
    """Report 2: eight logits that are NaN with its sign set."""
    nan = torch.full((1, 8), -64, dtype=torch.int16, device="cpu").view(torch.bfloat16)
    case = layer(
        "report 2, ids that are no experts", 8, Routing(RoutingMethodType.TopKSigmoid, 2), nan
    )
    note = NOTE.format("this row (golden case 0276, row 9): the ids 8 and 9, with weights of 0")
    return MoEFailure(case, BACKEND, None, origin=Origin("report 2", note=note))


REPORTS: dict[int, Callable[[], MoEFailure]] = {1: repeated_experts, 2: no_experts}
"""By the numbers of the page."""


def write(folder: Path) -> list[Path]:
    """Write a file for each report; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"report-{number}.safetensors" for number in REPORTS]
    for path, make in zip(paths, REPORTS.values(), strict=True):
        save_moe(path, make())
    return paths


if __name__ == "__main__":
    for written in write(Path(sys.argv[1])):
        print(f"nvfp4-moe replay {written}")
