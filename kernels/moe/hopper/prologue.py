"""Few tokens: their slots are sorted, and their rows written for the grouped GEMM, in one launch.

Some programs sort, one for each expert; others write a part of a token's row each. Those know where
rows go from the ids alone, so no program waits for another. Where it takes less time than a launch
(`routes`), every program first chooses the experts of all tokens from the logits, and the last programs
write the weights, one of a token each.
"""

# SPDX-License-Identifier: Apache-2.0
import torch
import triton
import triton.language as tl

from ....reference.moe.hidden_states import Activations
from ....reference.moe.routing import Routing
from ....reference.numerics.fp32 import rcp_delta
from ....reference.recipe import BLOCK_SIZE, Recipe
from ...allocate import aligned
from ...jit.decode import decode_row_to_places
from ...jit.formats import BF16
from ...jit.fragments import padded_to_fragments, store_fragments
from ...jit.load import load_blocks
from ...jit.pdl import await_previous
from ...launcher import launch, next_power_of_2
from ...quantize.kernel import quantize_row_to_places
from ...quantize.launch import BLOCKS_IN_REGISTERS, launch_config
from ...triton_target import INTERPRETING, arch, launch_options
from ..permute import Permutation, permute_kernel
from ..routing import Router, instruction_table, store_experts, store_weights

PLAIN = tl.constexpr(0)
QUANTIZED = tl.constexpr(1)
CODES = tl.constexpr(2)
"""The forms of rows: bf16 that is written as it is, or quantized per token; codes."""
_TOKENS = 16
_SLOTS = 256
"""The most tokens and slots of one launch: each program reads every slot's id."""
_STEPS = 8
_LOGITS = 512
"""The most experts of a token, and the most logits, of a launch that routes: a program does it all.

On an H200 a call of up to 512 logits takes 0.2 to 1.8 us less, one of 1,024 0.3 more (2026-12-01).
"""


def serves(tokens: int, top_k: int, columns: int) -> bool:
    """Return True if `sort_and_place` takes as many tokens, slots of each, and columns of a row."""
    return (
        0 < tokens <= _TOKENS
        and tokens * top_k <= _SLOTS
        and columns <= BLOCKS_IN_REGISTERS * BLOCK_SIZE
    )


def routes(logits: torch.Tensor, routing: Routing | Router) -> bool:
    """Return True if the launch also routes, where `serves` lets it through.

    It does where logits choose, in `top_k` steps that wait for one another. They are short with a
    token's logits in one warp: a lane reads 16 bytes of a row that begins at a multiple of 16 elements.
    """
    tokens, experts = logits.shape
    in_one_warp = experts * logits.element_size() <= 512 and experts % 16 == 0
    few = routing.top_k <= _STEPS and tokens * experts <= _LOGITS
    return routing.method.raw and in_one_warp and few


_Placed = tuple[Permutation, torch.Tensor, torch.Tensor | None]


def sort_and_place(
    a: Activations,
    ids: torch.Tensor,
    num_local: int,
    local_expert_offset: int,
    tile: int,
    recipe: Recipe | None,
    *,
    placed: bool = True,
) -> _Placed:
    """Do what `permute` does, and write the rows of `a` as the grouped GEMM reads them.

    The rows are those of `quantize_to_fragments`, `in_fragments` or `decode_to_fragments`.

    Args:
        a: bf16, or codes and their scales.
        ids, num_local, local_expert_offset, tile: as for `permute`.
        recipe: of a quantization of bf16 per token; None: rows are written as they are.
        placed: write a row once for each of its slots, at the slot's permuted row; False: once.

    Returns:
        (permutation, values [slots, K rounded up to 128] bf16, per-token scales [slots] fp32 or None);
        without `placed` of tokens in the place of slots.
    """
    return _launched(a, ids, num_local, local_expert_offset, tile, recipe, placed)[1]


def route_and_place(
    a: Activations,
    router: Router,
    num_local: int,
    local_expert_offset: int,
    tile: int,
    recipe: Recipe | None,
    *,
    placed: bool = True,
) -> tuple[tuple[torch.Tensor, torch.Tensor], _Placed]:
    """Do what `Router.route` and then `sort_and_place` do, of a router that `routes` lets through."""
    (ids, weights), rows = _launched(
        a, router, num_local, local_expert_offset, tile, recipe, placed
    )
    assert weights is not None
    return (ids, weights), rows


def _launched(
    a: Activations,
    routing: torch.Tensor | Router,
    num_local: int,
    local_expert_offset: int,
    tile: int,
    recipe: Recipe | None,
    placed: bool,
) -> tuple[tuple[torch.Tensor, torch.Tensor | None], _Placed]:
    x = aligned(a.hidden_states)
    tokens, top_k = routing.shape
    slots = tokens * top_k
    tiles = min(slots, num_local) + slots // tile
    columns = x.shape[1] if a.is_bf16 else x.shape[1] * 2
    blocks = columns // BLOCK_SIZE

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    four_over_six = recipe is not None and recipe.four_over_six is not None
    config = launch_config(tokens, max(blocks, 8), four_over_six=four_over_six)
    programs = num_local + tokens * config.splits
    weights, logits, experts, method, approximate = None, None, 0, None, False
    if isinstance(routing, Router):
        programs += tokens
        # A program reads the ids that it has written itself; those of the first are returned.
        every = empty(programs, tokens, top_k)
        ids = every[0]
        weights = empty(tokens, top_k, dtype=torch.bfloat16)
        logits, method, approximate = routing.logits, routing.method.value, routing.approximate
        experts = logits.shape[1]
    else:
        ids = every = routing.contiguous()
    p = Permutation(empty(slots), empty(slots), empty(tiles, 4), empty(num_local))
    rows = slots if placed else tokens
    values = empty(rows, padded_to_fragments(columns), dtype=torch.bfloat16)
    scaled = recipe is not None or a.per_token_scale is not None
    scale = empty(rows, dtype=torch.float32) if scaled else None
    form = QUANTIZED if recipe is not None else PLAIN if a.is_bf16 else CODES
    launch(prologue_kernel, (programs,),
        every, p.expanded, p.permuted, p.tiles, p.end,
        x.view(torch.uint16) if form is CODES else x.view(torch.int32),
        None if a.block_scales is None else a.block_scales.view(torch.uint8), a.per_token_scale,
        values, scale, rcp_delta(x.device) if INTERPRETING else None,
        logits, weights, instruction_table(x.device) if approximate and INTERPRETING else None,
        recipe.base_scale_inv if recipe is not None else 0.0,
        slots, tiles, local_expert_offset, num_local, blocks, experts,
        BINS=max(16, next_power_of_2(num_local + 1)), CHUNK=max(16, next_power_of_2(slots)),
        TILE=tile, FORM=form.value, RECIPE=0 if recipe is None else recipe.code,
        BLOCKS=config.blocks, READ=config.read, SPLITS=config.splits, SLOTS=top_k,
        PLACED=placed, ARCH=arch(x.device), METHOD=method, APPROXIMATE=approximate,
        ROWS=max(config.warps, next_power_of_2(tokens)), WIDTH=max(32, next_power_of_2(experts)),
        num_warps=config.warps, **launch_options(x.device),
    )  # fmt: skip
    return (ids, weights), (p, values, scale)


@triton.jit
def slot_places(ids_ptr, token, N, first_expert, E, CHUNK: tl.constexpr, SLOTS: tl.constexpr):
    """Return the permuted rows of a token's slots, a tuple of int32 [1, 1]; -1: not on this rank.

    Slots of lower experts come first, then earlier slots of the same expert.
    """
    index = tl.arange(0, CHUNK)
    local = tl.load(ids_ptr + index, index < N, other=first_expert - 1) - first_expert
    here = (local >= 0) & (local < E)
    places = ()  # type: tuple
    for slot in tl.static_range(SLOTS):
        own_index = token * SLOTS + slot
        own = tl.load(ids_ptr + own_index) - first_expert
        before = here & ((local < own) | ((local == own) & (index < own_index)))
        place = tl.where((own >= 0) & (own < E), tl.sum(before.to(tl.int32), 0), -1)
        places = places + (place + tl.zeros((1, 1), tl.int32),)  # noqa: RUF005, Triton has no star
    return places


@triton.jit
def row_places(
    ids_ptr, token, row, N, first_expert, E, CHUNK: tl.constexpr, SLOTS: tl.constexpr,
    PLACED: tl.constexpr,
):  # fmt: skip
    """Return where a token's row goes: to the permuted rows of its slots, or without PLACED to `row`."""
    if PLACED:
        places = slot_places(ids_ptr, token, N, first_expert, E, CHUNK, SLOTS)
    else:
        places = (row,)
    return places


@triton.jit(do_not_specialize=["N", "tiles", "first_expert"])
def prologue_kernel(
    ids_ptr,  # [N] int32 global expert ids, by expanded index; with METHOD, [programs, N] to be written
    expanded_ptr, permuted_ptr, tile_ptr, end_ptr,  # as `permute_kernel` writes them
    x_ptr,  # [N / SLOTS, 16 NB] bf16 as int32 words, or codes, four in an uint16
    sf_ptr,  # [N / SLOTS, NB] uint8, of codes
    given_ptr,  # [N / SLOTS] fp32, of codes, or None
    values_ptr,  # [N, or without PLACED N / SLOTS, 16 NB rounded up to 128] bf16
    token_ptr,  # [N, or N / SLOTS] fp32, or None
    rcp_delta_ptr,  # [2^23] int8, in the interpreter
    logits_ptr,  # [N / SLOTS, ROUTED] fp32 or bf16, with METHOD
    weights_ptr,  # [N / SLOTS, SLOTS] bf16, with METHOD
    table_ptr,  # with APPROXIMATE in the interpreter, of `jit.instructions`
    base_scale_inv,
    N,
    tiles,
    first_expert,
    E,
    NB,
    ROUTED,  # experts of the logits
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,  # a power of two >= N
    TILE: tl.constexpr,
    FORM: tl.constexpr,
    RECIPE: tl.constexpr,  # Recipe.code, of QUANTIZED
    BLOCKS: tl.constexpr,  # of a row, written by a program
    READ: tl.constexpr,  # as `quantize_row_to_places` takes it
    SPLITS: tl.constexpr,  # programs that share a row
    SLOTS: tl.constexpr,
    PLACED: tl.constexpr,  # a row is written once for each slot; otherwise once
    ARCH: tl.constexpr,
    METHOD: tl.constexpr,  # of a routing from logits; None: the ids are given
    APPROXIMATE: tl.constexpr,  # as `route_kernel` takes it
    ROWS: tl.constexpr,  # as `store_experts` takes both
    WIDTH: tl.constexpr,
):  # fmt: skip
    await_previous(ARCH)
    tokens = N // SLOTS
    if METHOD is not None:
        ids_ptr += tl.program_id(0) * N
        store_experts(logits_ptr, ids_ptr, tokens, ROUTED, SLOTS, METHOD, ROWS, WIDTH, ARCH)
        tl.debug_barrier()  # what a warp has written, others read
    if tl.program_id(0) < E:
        permute_kernel(
            ids_ptr, expanded_ptr, permuted_ptr, tile_ptr, end_ptr, N, tiles, first_expert, E, BINS,
            CHUNK, TILE, ARCH,
        )  # fmt: skip
    elif tl.program_id(0) >= E + tokens * SPLITS:
        if METHOD is not None:
            store_weights(
                logits_ptr, ids_ptr, weights_ptr, tl.program_id(0) - E - tokens * SPLITS, ROUTED,
                table_ptr, rcp_delta_ptr, SLOTS, METHOD, ARCH, APPROXIMATE,
            )  # fmt: skip
    else:
        part = tl.program_id(0) - E
        token = part // SPLITS
        first = part % SPLITS * BLOCKS
        row = token.to(tl.int64) + tl.zeros((1, 1), tl.int64)
        COPIES: tl.constexpr = SLOTS if PLACED else 1
        # What is read of the row is on its way while its places are found.
        if FORM == QUANTIZED:
            block = first + tl.arange(0, BLOCKS)[None, :]
            words = load_blocks(x_ptr, row, block, block < NB, NB, BF16)
            places = row_places(ids_ptr, token, row, N, first_expert, E, CHUNK, SLOTS, PLACED)
            quantize_row_to_places(
                words, x_ptr, row, first, places, values_ptr, token_ptr, base_scale_inv,
                rcp_delta_ptr, NB, RECIPE, BF16, BLOCKS, READ, COPIES, ARCH,
            )  # fmt: skip
        elif FORM == PLAIN:
            column = first * 16 + tl.arange(0, BLOCKS * 16)[None, :]
            bf16_ptr = x_ptr.to(tl.pointer_type(tl.bfloat16))
            x = tl.load(bf16_ptr + row * NB * 16 + column, column < NB * 16, other=0.0)
            places = row_places(ids_ptr, token, row, N, first_expert, E, CHUNK, SLOTS, PLACED)
            store_fragments(x, values_ptr, places, first * 16, NB * 16, COPIES)
        else:
            places = row_places(ids_ptr, token, row, N, first_expert, E, CHUNK, SLOTS, PLACED)
            decode_row_to_places(
                x_ptr, sf_ptr, given_ptr, row, first, places, values_ptr, token_ptr, NB, BLOCKS,
                COPIES, ARCH,
            )  # fmt: skip
