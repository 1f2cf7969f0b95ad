"""Realistic mistakes in the Triton kernels, each an edit of their syntax (`syntax.py`).

Only what the interpreter runs can be shown: integer paths in place of inline assembly, one launch
configuration of the quantizer. Not here, since no output can show them: both operands' nibbles or
columns exchanged alike (a sum takes any order, so such an edit needs hidden states that are not
decoded), the order of rows within an expert, columns whose codes or block scales alone are masked (the
other is zero), the zero in padded columns of block scales (a block of zeros has it anyway).
"""

# SPDX-License-Identifier: Apache-2.0
from .edited_copy import KernelMutant
from .syntax import Edit

# Name, old syntax, new syntax, call, then names of functions and tests of `if`s that the place is in.
Entry = tuple[str, ...]

_EXCHANGED = (
    "in_tile = ((row & 31) << 4) + ((row >> 5 & 3) << 2)\n"
    "tile = T_\n"
    "offset = (tile << 9) + in_tile + in_four",
    "in_tile = ((row & 31) << 4) + (row >> 5 & 3)\n"
    "tile = T_\n"
    "offset = (tile << 9) + in_tile + (in_four << 2)",
)

_SUMS: tuple[Entry, ...] = (
    (
        "128x4: row quarter and column exchanged",
        *_EXCHANGED,
        "qwen",
    ),
    (
        "128x4: row within the tile not divided",
        "(row & 31) << 4",
        "(row & 127) >> 2 << 4",
        "qwen",
        "tiled_scale_offset",
    ),
    (
        "128x4: columns of the next tile forgotten",
        "(row >> 7) * tiles + four",
        "(row >> 7) * tiles",
        "qwen",
    ),
    (
        "block scale of the neighbouring block",
        "tiled_scale_offset(R_, Q_, (column % 4)[None, :], sf_tiles)",
        "tiled_scale_offset(R_, Q_, (column % 4 ^ 1)[None, :], sf_tiles)",
        "qwen",
        "sums",
    ),
    (
        "block scales half a tile behind",
        "w_sf += BK // 64 * 512",
        "w_sf += BK // 64 * 256",
        "qwen",
        "sums",
    ),
    (
        "fourth columns from the third plane",
        "x3 = tl.load(x + 3 * K4)",
        "x3 = tl.load(x + 2 * K4)",
        "qwen",
    ),
    (
        "K loop one tile short",
        "tl.range(0, K4, WORDS, num_stages=S_)",
        "tl.range(WORDS, K4, WORDS, num_stages=S_)",
        "qwen",
    ),
    (
        "columns after the last whole K tile dropped",
        "word < K4 - k",
        "word < (K4 - k) // WORDS * WORDS",
        "K of 1 1/2 tiles",
    ),
    ("the accumulator not carried on", "tl.dot(A_, x3, acc)", "tl.dot(A_, x3)", "qwen"),
    (
        "decoded weights: K loop one tile short",
        "tl.range(0, K, BK, num_stages=S_)",
        "tl.range(BK, K, BK, num_stages=S_)",
        "decoded",
        "decoded_sums",
    ),
)

_GEMM: tuple[Entry, ...] = (
    ("an expert's last row dropped", "n < end", "n < end - 1", "qwen"),
    (
        "the slot for the token",
        "L_ // X_DIVISOR",
        "L_ % X_DIVISOR",
        "qwen",
    ),
    (
        "hidden states of the permuted row",
        "source.to(tl.int64)",
        "tl.minimum(n, end - 1).to(tl.int64)",
        "top 1",
    ),
    (
        "per-token scale of the permuted row",
        "tl.load(token_scale_ptr + source, live, other=0.0)",
        "tl.load(token_scale_ptr + n, live, other=0.0)",
        "top 1",
    ),
    (
        "per-token scale left out",
        "acc * S_",
        "acc + 0 * S_",
        "qwen",
        "token_scale_ptr is not None",
    ),
    (
        "bias added after the scalar",
        "tl.load(bias_ptr + expert_rows + m)[:, None]",
        "tl.load(bias_ptr + expert_rows + m)[:, None] / tl.load(scale_ptr + expert)",
        "gpt-oss",
    ),
    (
        "bias of the first expert",
        "tl.load(bias_ptr + expert_rows + m)",
        "tl.load(bias_ptr + m)",
        "gpt-oss",
    ),
    (
        "scalar of the first expert",
        "activated(up, gate, of_expert(scale_ptr, expert), gate_scale, of_expert(alpha_ptr, expert), "
        "of_expert(beta_ptr, expert), limit_of_expert(limit_ptr, gate_scale, expert, ACT), ACT)",
        "activated(up, gate, of_expert(scale_ptr, 0), gate_scale, of_expert(alpha_ptr, expert), "
        "of_expert(beta_ptr, expert), limit_of_expert(limit_ptr, gate_scale, expert, ACT), ACT)",
        "qwen",
    ),
    (
        "gated rows not put back",
        "tl.permute(tl.reshape(acc, (G, 2, 2, 8, BN)), (0, 3, 1, 4, 2))",
        "tl.permute(tl.reshape(acc, (G, 2, 2, 8, BN)), (0, 1, 3, 4, 2))",
        "qwen",
    ),
    (
        "rows put back by 4s for 8s",
        "tl.reshape(acc, (G, 4, 8, BN))",
        "tl.reshape(acc, (G, 8, 4, BN))",
        "grid",
    ),
    ("gate and up exchanged", "up, gate = tl.split(P_)", "gate, up = tl.split(P_)", "qwen"),
    (
        "limit after the scale",
        "_at_most(gate, limit) * gate_scale",
        "_at_most(gate * gate_scale, limit)",
        "gpt-oss",
        "ACT == SWIGLU",
    ),
    (
        "up limited from above alone",
        "_clamped(up, limit)",
        "_at_most(up, limit)",
        "gpt-oss",
        "ACT == SWIGLU",
    ),
    ("beta left out", "u + beta", "u", "gpt-oss", "ACT == SWIGLU"),
    ("beta after the scale", "u + beta", "u + beta / scale", "gpt-oss", "ACT == SWIGLU"),
    ("alpha left out", "alpha * g", "g", "gpt-oss"),
    ("sigmoid of the unscaled gate", "argument = g", "argument = gate", "qwen"),
    ("SwigluStep: the default limit times the scale", "7.0 / gate_scale", "7.0 * gate_scale",
     "SwigluStep alone"),
    ("SwigluStep: the default limit without the scale", "7.0 / gate_scale", "7.0",
     "SwigluStep alone"),
    ("GegluTanh: the constant of three digits", "0.044715 * x * x * x", "0.0447 * x * x * x",
     "GegluTanh alone"),
    ("Geglu: the constant of three digits", "tl.fma(tl.abs(x), 0.2121320366859436, 1.0)",
     "tl.fma(tl.abs(x), 0.212, 1.0)", "Geglu alone"),
    ("Situ: up over alpha", "_scaled_tanh(u, beta)", "_scaled_tanh(u, alpha)", "Situ alone"),
    ("products in bf16", "tl.dot(scaled(decode_fourth(codes, 2, ARCH), scale, ARCH), x2, acc)",
     "tl.dot(scaled(decode_fourth(codes, 2, ARCH), scale, ARCH), x2, acc)"
     ".to(tl.bfloat16).to(tl.float32)", "cancelling sums"),
    ("static: the up scalar left out", "u * scale", "u", "Swiglu, static", "ACT == SWIGLU"),
    ("TopKSigmoid: the logit for its sigmoid", "METHOD == LLAMA4 or METHOD == TOP_K_SIGMOID",
     "METHOD == LLAMA4", "every routing method"),
    ("Relu2 squares before the scale", "g = g * g", "g = g * gate", "top 1"),
    ("results truncated to bf16", "to_bf16(y, ARCH)", "y.to(tl.bfloat16)", "qwen", "_expert_tile"),
    (
        "half a tile for more rows than it holds",
        "rows <= BN // 2",
        "rows <= BN",
        "tiles of 32",
    ),
)  # fmt: skip

_SMALL: tuple[Entry, ...] = (
    ("finalize: an index of 32 bits", "row.to(tl.int64) * H", "row * H", "far rows"),
    (
        "finalize: weights in fp16",
        "tl.load(weights_ptr + token * K + k).to(tl.float32)",
        "tl.load(weights_ptr + token * K + k).to(tl.float16).to(tl.float32)",
        "any size, to fp32",
    ),
    (
        "an expert's last tile dropped",
        "_store_tiles(tile_ptr, place, expert, F_, rest, used, L_)",
        "_store_tiles(tile_ptr, place, -1, F_, rest, used, L_)",
        "tiles of 16",
    ),
    (
        "an expert's last tile one row short",
        "_store_tiles(tile_ptr, place, expert, F_, rest, used, L_)",
        "_store_tiles(tile_ptr, place, expert, F_, rest - 1, used, L_)",
        "tiles of 16",
    ),
    (
        "tiles of 16 rows for any tile",
        "first_row + own * TILE",
        "first_row + own * 16",
        "tiles of 32",
    ),
    (
        "counts of one expert less before an expert",
        "tl.sum(tl.where(tl.arange(0, BINS) < expert, counts, 0))",
        "tl.sum(tl.where(tl.arange(0, BINS) < expert - 1, counts, 0))",
        "tiles of 16",
    ),
    (
        "slots of other ranks given row 0",
        "tl.store(permuted_ptr + index, -1, M_)",
        "tl.store(permuted_ptr + index, 0, M_)",
        "deepseek",
    ),
    (
        "three launches: slots of other ranks given a row",
        "tl.where(is_local, row, -1)",
        "row",
        "three launches",
    ),
    (
        "hidden states: block scale of the neighbouring block",
        "scale_offset(row, block, sf_columns, LAYOUT)",
        "scale_offset(row, block ^ 1, sf_columns, LAYOUT)",
        "qwen",
    ),
    (
        "hidden states: columns in reverse within four",
        "(row * 4 + j) * padded",
        "(row * 4 + (3 - j)) * padded",
        "qwen",
    ),
    (
        "decoded weights: 128x4's row quarter and column exchanged",
        *_EXCHANGED,
        "decoded",
    ),
    (
        "finalize: row -1 read",
        "is_local = tl.where(inside, row, -1) >= 0",
        "row = tl.maximum(row, 0)\nis_local = inside",
        "deepseek",
    ),
    (
        "finalize: weight of the first slot",
        "tl.load(weights_ptr + token * K + k)",
        "tl.load(weights_ptr + token * K)",
        "qwen",
    ),
    (
        "finalize: product rounded",
        "fma(value, weight, onto, FTZ, ARCH)",
        "value * weight + onto",
        "cancelling",
    ),
    (
        "finalize: the last group alone",
        "part if j == 0 else add(total, part, FTZ, ARCH)",
        "part",
        "deepseek",
    ),
    (
        "finalize: partial sums in bf16",
        "added = fma(value, weight, onto, FTZ, ARCH)",
        "added = to_bf16(fma(value, weight, onto, FTZ, ARCH), ARCH).to(tl.float32)",
        "deepseek",
    ),
    (
        "finalize: truncated to bf16",
        "tl.store(out, to_bf16(total, ARCH), inside)",
        "tl.store(out, total.to(tl.bfloat16), inside)",
        "qwen",
    ),
)

_ROUTING: tuple[Entry, ...] = (
    ("no epsilon in the sum", "A_ + 1e-20", "A_ + 0.0", "saturated routers"),
    (
        "keys of bf16",
        "bits = x.to(tl.int32, bitcast=True)",
        "bits = x.to(tl.int32, bitcast=True) & -65536",
        "undecided routers",
        "_key",
    ),
    (
        "ties to the larger index",
        "tl.min(tl.where(inside & (key == best), expert, WIDTH), 0)",
        "tl.max(tl.where(inside & (key == best), expert, -1), 0)",
        "qwen",
    ),
    (
        "the bias in the weights",
        "tl.where(expert == first, value, 0)",
        "tl.where(expert == first, score.to(tl.int32, bitcast=True), 0)",
        "no groups",
    ),
    ("the bias not added", "score = add(score, bias, True, ARCH)", "score = score", "no groups"),
    (
        "scaling factor left out",
        "mul(chosen, tl.zeros_like(chosen) + scale, True, ARCH)",
        "chosen",
        "no groups",
    ),
    (
        "weights not normalized",
        "weight = _share(e, _warp_sum(e), rcp_delta_ptr, APPROXIMATE, ARCH)",
        "weight = e",
        "qwen",
    ),
    (
        "weights truncated to bf16",
        "to_bf16(weight, ARCH)",
        "weight.to(tl.bfloat16)",
        "qwen",
        "route_kernel",
    ),
    (
        "bits of negative scores compared unturned",
        "bits ^ ((bits >> 31) & 0x7FFFFFFF)",
        "bits",
        "qwen",
    ),
)

_QUANTIZER: tuple[Entry, ...] = (
    (
        "row maximum of half the row",
        "or_zero(tl.max(largest, 1))",
        "or_zero(tl.max(largest * (tl.arange(0, largest.shape[1]) < largest.shape[1] // 2), 1))",
        "quantizer, fast, 128x4",
    ),
    (
        "even and odd elements exchanged",
        "tl.permute(tl.join(even, odd), (0, 1, 3, 2, 4))",
        "tl.permute(tl.join(odd, even), (0, 1, 3, 2, 4))",
        "quantizer, fast, 128x4",
    ),
    (
        "128x4: row quarter and column exchanged",
        *_EXCHANGED,
        "quantizer, fast, 128x4",
    ),
    (
        "8x4: row and column exchanged",
        "in_tile = (row & 7) << 2\ntile = T_\noffset = (tile << 5) + in_tile + in_four",
        "in_tile = row & 7\ntile = T_\noffset = (tile << 5) + in_tile + (in_four << 3)",
        "quantizer, exact, 8x4",
    ),
    (
        "first padding row of block scales not written",
        "base + row >= M",
        "base + row > M",
        "quantizer, fast, 128x4",
    ),
    (
        "padded columns of block scales not written",
        "tl.store(P_, byte, live & (column < padded_columns - SHIFT))",
        "tl.store(P_, byte, mask)",
        "quantizer, fast, 128x4",
    ),
    (
        "exact math: division by 6 for the product",
        "mul(amax, mul(encode, SIXTH, FTZ, ARCH), FTZ, ARCH)",
        "mul(div(amax, 6.0, FTZ, ARCH), encode, FTZ, ARCH)",
        "quantizer, exact, 8x4",
    ),
    (
        "output scale from the unrounded block scale",
        "byte, sf = e4m3_round(unrounded, ARCH)\noutput_scale = _output_scale(sf, encode, A_, B_, C_)",
        "byte, sf = e4m3_round(unrounded, ARCH)\n"
        "output_scale = _output_scale(unrounded, encode, A_, B_, C_)",
        "quantizer, fast, 128x4",
        "quantize_block",
    ),
    (
        "4over6: the candidate of the larger error",
        "this_error < error",
        "this_error > error",
        "quantizer, 4over6",
    ),
    ("4over6: ties to 4", "this_error < error", "this_error <= error", "quantizer, 4over6"),
    (
        "4over6: errors summed in another order",
        "add_magnitudes(total, after[i], FTZ, ARCH)",
        "add_magnitudes(total, after[14 - i], FTZ, ARCH)",
        "quantizer, 4over6",
    ),
    (
        "fp32: block scale from the row's maximum alone",
        "denominator = mul(scale, output_scale, True, ARCH)",
        "denominator = scale",
        "quantizer, fp32",
    ),
    (
        "values: block scale of the neighbouring row's block",
        "scale = e4m3_decode(byte)[:, :, None]",
        "scale = e4m3_decode(tl.flip(byte, 1))[:, :, None]",
        "qwen",
        "_store_values",
    ),
)

_LEAVES: tuple[Entry, ...] = (
    (
        "subnormals decoded as 0",
        "tl.where(byte & 0x7F == 0x7F, N_, value)",
        "tl.where(byte & 0x7F == 0x7F, N_, tl.where(byte & 0x78 == 0, 0.0, value))",
        "far below",
    ),
    (
        "subnormals encoded as 0",
        "tl.where(x < 0.015625, subnormal, N_)",
        "tl.where(x < 0.015625, 0, N_)",
        "far below",
    ),
    (
        "nibbles exchanged in the decoding",
        "(words.to(tl.int32) >> (4 * WHICH)) & 15",
        "(words.to(tl.int32) >> (4 * (WHICH ^ 1))) & 15",
        "bf16",
    ),
    ("sign of a code lost", "((w & 7) << 22) | ((w & 8) << 28)", "(w & 7) << 22", "qwen"),
    (
        "nibbles exchanged in the encoding",
        "groups << (tl.arange(0, 8) * 4)[None, None, None, :]",
        "groups << ((tl.arange(0, 8) ^ 1) * 4)[None, None, None, :]",
        "quantizer, fast, 128x4",
    ),
    (
        "codes saturate at 4",
        "a = smaller(a, 6.0, ARCH)",
        "a = smaller(a, 4.0, ARCH)",
        "quantizer, fast, 128x4",
    ),
    (
        "ties of a code round up",
        "tl.fma(near, -4194304.0, a)",
        "tl.fma(near, -4194304.0, a * 1.0000001)",
        "quantizer, fast, 128x4",
    ),
    (
        "e4m3 saturates to NaN",
        "tl.minimum(normal, 0x7E)",
        "tl.minimum(normal, 0x7F)",
        "quantizer, saturating",
    ),
    (
        "e4m3 truncated",
        "((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20)",
        "(bits >> 20)",
        "quantizer, fast, 128x4",
    ),
    (
        "ties of e4m3 round up",
        "((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20)",
        "((bits + 0x80000) >> 20)",
        "quantizer, fast, 128x4",
    ),
    (
        "reciprocal by division",
        "tl.div_rn(1.0, unit).to(tl.int32, bitcast=True) + delta",
        "tl.div_rn(1.0, unit).to(tl.int32, bitcast=True)",
        "quantizer, fast, 128x4",
    ),
    ("ties of bf16 round up", "(bits + 0x7FFF + ((bits >> 16) & 1))", "(bits + 0x8000)", "grid"),
)

_LAUNCHES: tuple[Entry, ...] = (
    (
        "local expert offset ignored",
        "ids = ids.contiguous()",
        "ids, local_expert_offset = ids.contiguous(), 0",
        "deepseek",
        "permute",
    ),
    (
        "decoded weights: always of the first experts",
        "some = slice(expert, expert + at_once)",
        "some = slice(0, at_once)",
        "decoded",
    ),
    (
        "finalize: slots ascending for groups",
        'groups = split_k_groups(tokens, top_k, width) if order == "flashinfer" else 1',
        "groups = 1",
        "cancelling",
    ),
    (
        "intermediate not requantized",
        "if plain:\n    x2 = A_\nelse:\n    x2 = B_",
        "if not static:\n    x2 = A_\nelse:\n    x2 = B_",
        "qwen",
    ),
    (
        "up scalar for the gate",
        "experts.output1_scale_gate_scalar if first else None",
        "experts.output2_scale_scalar if first else None",
        "qwen",
    ),
    (
        "base scale of requantization 1",
        "recipe.base_scale_inv if per_token else 1.0",
        "1.0",
        "qwen",
        "quantize_to_values",
    ),
    (
        "base scale of e4m3_max 448 whatever the recipe",
        "values = x.new_empty((rows, 4, columns // 4), dtype=torch.bfloat16)",
        "values = x.new_empty((rows, 4, columns // 4), dtype=torch.bfloat16)\n"
        "recipe = Recipe(recipe.math)",
        "4over6",
    ),
)


KERNEL_MUTANTS = tuple(
    KernelMutant(name, call, Edit(old, new, tuple(within)))
    for name, old, new, call, *within in (
        *_SUMS,
        *_GEMM,
        *_SMALL,
        *_ROUTING,
        *_QUANTIZER,
        *_LEAVES,
        *_LAUNCHES,
    )
)
