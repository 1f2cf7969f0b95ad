"""A catalogue of realistic mistakes in the Triton kernels, each an edit of their source.

Only what the interpreter runs can be shown: integer paths in place of inline assembly, one launch
configuration of the quantizer. Not here, since no output can show them: both operands' nibbles or
columns exchanged alike (a sum takes any order, so such an edit needs hidden states that are not
decoded), the order of rows within an expert, columns whose codes or block scales alone are masked (the
other is zero), the zero in padded columns of block scales (a block of zeros has it anyway).
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

from .planted import KernelMutant

Edit = tuple[str, str, str, str]  # name, old text, new text, call

_SUMS: tuple[Edit, ...] = (
    (
        "128x4: row quarter and column exchanged",
        "row % 128 // 32 * 4 + column % 4",
        "row % 128 // 32 + column % 4 * 4",
        "qwen",
    ),
    ("128x4: row within the tile not divided", "(row % 32) * 16", "(row % 128 // 4) * 16", "qwen"),
    (
        "128x4: columns of the next tile forgotten",
        "(row // TILE) * sf_tiles + column // 4\n",
        "(row // TILE) * sf_tiles\n",
        "qwen",
    ),
    (
        "block scale of the neighbouring block",
        "column[None, :], sf_tiles)\n    x = x_ptr + source[None, :] * (4 * K4)",
        "column[None, :] ^ 1, sf_tiles)\n    x = x_ptr + source[None, :] * (4 * K4)",
        "qwen",
    ),
    (
        "block scales half a tile behind",
        "        w_sf += BK // 64 * 512\n        x += WORDS\n",
        "        w_sf += BK // 64 * 256\n        x += WORDS\n",
        "qwen",
    ),
    ("fourth columns from the third plane", "x3 = tl.load(x + 3 * K4)", "x3 = tl.load(x + 2 * K4)",
     "qwen"),
    (
        "K loop one tile short",
        "for k in tl.range(0, K4, WORDS,",
        "for k in tl.range(WORDS, K4, WORDS,",
        "qwen",
    ),
    (
        "columns after the last whole K tile dropped",
        "inside = word < K4 - k\n",
        "inside = word < (K4 - k) // WORDS * WORDS\n",
        "K of 1 1/2 tiles",
    ),
    (
        "the accumulator not carried on",
        "scaled(decode_fourth(codes, 3, ARCH), scale, ARCH), x3, acc)",
        "scaled(decode_fourth(codes, 3, ARCH), scale, ARCH), x3)",
        "qwen",
    ),
    (
        "decoded weights: K loop one tile short",
        "for _ in tl.range(0, K, BK,",
        "for _ in tl.range(BK, K, BK,",
        "decoded",
    ),
)  # fmt: skip

_GEMM: tuple[Edit, ...] = (
    ("an expert's last row dropped", "live = n < end\n", "live = n < end - 1\n", "qwen"),
    (
        "the slot for the token",
        "live, other=0) // X_DIVISOR",
        "live, other=0) % X_DIVISOR",
        "qwen",
    ),
    (
        "hidden states of the permuted row",
        "    source = tl.where(live, source, 0)",
        "    source = tl.where(live, n, 0)",
        "top 1",
    ),
    (
        "per-token scale of the permuted row",
        "tl.load(token_scale_ptr + source, live",
        "tl.load(token_scale_ptr + n, live",
        "top 1",
    ),
    (
        "per-token scale left out",
        "    if token_scale_ptr is not None:\n        acc = acc * ",
        "    if token_scale_ptr is not None:\n        acc = acc + 0 * ",
        "qwen",
    ),
    (
        "bias added after the scalar",
        "acc = acc + tl.load(bias_ptr + expert_rows + m)[:, None]",
        "acc = acc + tl.load(bias_ptr + expert_rows + m)[:, None] / tl.load(scale_ptr + expert)",
        "gpt-oss",
    ),
    (
        "bias of the first expert",
        "tl.load(bias_ptr + expert_rows + m)",
        "tl.load(bias_ptr + m)",
        "gpt-oss",
    ),
    ("scalar of the first expert", "tl.load(scale_ptr + expert)", "tl.load(scale_ptr)", "qwen"),
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
    ("gate and up exchanged", "up, gate = tl.split", "gate, up = tl.split", "qwen"),
    (
        "limit after the scale",
        "g = tl.minimum(gate, limit) * gate_scale\n        y = g / (1.0 + tl.exp(-alpha",
        "g = tl.minimum(gate * gate_scale, limit)\n        y = g / (1.0 + tl.exp(-alpha",
        "gpt-oss",
    ),
    (
        "up limited from above alone",
        "u = tl.minimum(tl.maximum(up, -limit), limit) * scale",
        "u = tl.minimum(up, limit) * scale",
        "gpt-oss",
    ),
    ("beta left out", "(u + beta)", "u", "gpt-oss"),
    ("alpha left out", "tl.exp(-alpha * g)", "tl.exp(-g)", "gpt-oss"),
    (
        "sigmoid of the unscaled gate",
        "tl.exp(-alpha * g)",
        "tl.exp(-alpha * tl.minimum(gate, limit))",
        "qwen",
    ),
    ("Relu2 squares before the scale", "g = g * g", "g = g * gate", "top 1"),
    ("results truncated to bf16", "y = to_bf16(y, ARCH)", "y = y.to(tl.bfloat16)", "qwen"),
    (
        "half a tile for more rows than it holds",
        "half = end - first <= BN // 2",
        "half = end - first <= BN",
        "tiles of 32",
    ),
)  # fmt: skip

_SMALL: tuple[Edit, ...] = (
    (
        "an expert's last tile dropped",
        "own = (count + TILE - 1) // TILE",
        "own = count // TILE",
        "tiles of 16",
    ),
    (
        "an expert's end one row early",
        "tl.store(end_ptr + expert, first_row + count)",
        "tl.store(end_ptr + expert, first_row + count - 1)",
        "tiles of 16",
    ),
    (
        "tiles of 16 rows for any tile",
        "first_row + i * TILE, i < until",
        "first_row + i * 16, i < until",
        "tiles of 32",
    ),
    (
        "counts of one expert less before an expert",
        "first_row = tl.sum(tl.where(bins < expert, counts, 0))",
        "first_row = tl.sum(tl.where(bins < expert - 1, counts, 0))",
        "tiles of 16",
    ),
    (
        "slots held elsewhere given row 0",
        "tl.store(permuted_ptr + index, -1, elsewhere",
        "tl.store(permuted_ptr + index, 0, elsewhere",
        "deepseek",
    ),
    (
        "three launches: slots held elsewhere given a row",
        "tl.where(held, row, -1)",
        "row",
        "three launches",
    ),
    (
        "hidden states: block scale of the neighbouring block",
        "row * (K // 16) + word // 4,",
        "row * (K // 16) + (word // 4 ^ 1),",
        "qwen",
    ),
    (
        "hidden states: columns in reverse within four",
        "tl.store(out + i * (K // 4),",
        "tl.store(out + (3 - i) * (K // 4),",
        "qwen",
    ),
    (
        "decoded weights: 128x4's row quarter and column exchanged",
        "line // 32 * 4 + block % 4",
        "line // 32 + block % 4 * 4",
        "decoded",
    ),
    ("finalize: row -1 read", "held = tl.where(inside, row, -1) >= 0",
     "row = tl.maximum(row, 0)\n            held = inside", "deepseek"),
    (
        "finalize: weight of the first slot",
        "tl.load(weights_ptr + token * K + k)",
        "tl.load(weights_ptr + token * K)",
        "qwen",
    ),
    (
        "finalize: product rounded",
        "(value.to(tl.float64) * weight + part).to(tl.float32)",
        "value.to(tl.float32) * weight + part",
        "cancelling",
    ),
    ("finalize: the last group alone", "part if j == 0 else total + part", "part", "deepseek"),
    ("finalize: partial sums in bf16", "if j == 0 else total + part\n",
     "if j == 0 else total + part\n        total = to_bf16(total, ARCH).to(tl.float32)\n",
     "deepseek"),
    (
        "finalize: truncated to bf16",
        "tl.store(out, to_bf16(total, ARCH), inside)",
        "tl.store(out, total.to(tl.bfloat16), inside)",
        "qwen",
    ),
)  # fmt: skip

_ROUTING: tuple[Edit, ...] = (
    (
        "ties to the larger index",
        "tl.min(tl.where(inside & (key == best), expert, WIDTH), 0)",
        "tl.max(tl.where(inside & (key == best), expert, -1), 0)",
        "qwen",
    ),
    (
        "the bias in the weights",
        "tl.where(expert == first, value, 0.0)",
        "tl.where(expert == first, score, 0.0)",
        "no groups",
    ),
    ("the bias not added", "score = score + tl.load(bias_ptr", "score = score + 0 * tl.load(bias_ptr",
     "no groups"),
    ("scaling factor left out", "weight = chosen * scale /", "weight = chosen /", "no groups"),
    ("weights not normalized", "weight = e / tl.sum(e, 0)", "weight = e", "qwen"),
    (
        "weights truncated to bf16",
        "to_bf16(weight, ARCH)",
        "weight.to(tl.bfloat16)",
        "qwen",
    ),
    (
        "bits of negative scores compared unturned",
        "bits ^ ((bits >> 31) & 0x7FFFFFFF)",
        "bits",
        "qwen",
    ),
)  # fmt: skip

_QUANTIZER: tuple[Edit, ...] = (
    (
        "row maximum of half the row",
        "_or_zero(tl.max(largest, 1))",
        "_or_zero(tl.max(tl.where(block < NB // 2, largest, 0.0), 1))",
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
        "(row % 128 // 32) * 4 + block % 4",
        "(row % 128 // 32) + block % 4 * 4",
        "quantizer, fast, 128x4",
    ),
    (
        "8x4: row and column exchanged",
        "(row % 8) * 4 + block % 4",
        "(row % 8) + block % 4 * 8",
        "quantizer, exact, 8x4",
    ),
    (
        "first padding row of block scales not written",
        "(base + row >= M)",
        "(base + row > M)",
        "quantizer, fast, 128x4",
    ),
    (
        "padded columns of block scales not written",
        "byte, live & (column < padded_columns)",
        "byte, mask",
        "quantizer, fast, 128x4",
    ),
    (
        "exact math: division by 6 for the product",
        "unrounded = mul(amax, mul(encode, SIXTH, FTZ, ARCH), FTZ, ARCH)",
        "unrounded = mul(div(amax, 6.0, FTZ, ARCH), encode, FTZ, ARCH)",
        "quantizer, exact, 8x4",
    ),
    (
        "output scale from the unrounded block scale",
        "byte = e4m3_encode(unrounded, ARCH)\n        output_scale = _output_scale(e4m3_decode(byte),",
        "byte = e4m3_encode(unrounded, ARCH)\n        output_scale = _output_scale(unrounded,",
        "quantizer, fast, 128x4",
    ),
    (
        "4over6: the candidate of the larger error",
        "better = (this_error < error)",
        "better = (this_error > error)",
        "quantizer, 4over6",
    ),
    (
        "4over6: ties to 4",
        "better = (this_error < error)",
        "better = (this_error <= error)",
        "quantizer, 4over6",
    ),
    (
        "4over6: both halves' sums added",
        "add(add(add(total, a7, FTZ, ARCH), b0, FTZ, ARCH), b1, FTZ, ARCH)",
        "add(add(total, a7, FTZ, ARCH), add(b0, b1, FTZ, ARCH), FTZ, ARCH)",
        "quantizer, 4over6",
    ),
    ("fp32: block scale from the row's maximum alone",
     "denominator = mul(scale, output_scale, True, ARCH)",
     "denominator = scale", "quantizer, fp32"),
    (
        "values: block scale of the neighbouring row's block",
        "scale = e4m3_decode(byte)[:, :, None]",
        "scale = e4m3_decode(tl.flip(byte, 1))[:, :, None]",
        "qwen",
    ),
)  # fmt: skip

_LEAVES: tuple[Edit, ...] = (
    (
        "nibbles exchanged in the decoding",
        "(words.to(tl.int32) >> (4 * WHICH)) & 15",
        "(words.to(tl.int32) >> (4 * (WHICH ^ 1))) & 15",
        "bf16",
    ),
    ("sign of a code lost", "((w & 7) << 22) | ((w & 8) << 28)", "(w & 7) << 22", "qwen"),
    (
        "nibbles exchanged in the encoding",
        "shift = (tl.arange(0, 8) * 4)[None, None, None, :].to(tl.uint32)",
        "shift = ((tl.arange(0, 8) ^ 1) * 4)[None, None, None, :].to(tl.uint32)",
        "quantizer, fast, 128x4",
    ),
    ("codes saturate at 4", "twos), 0x4B000007)", "twos), 0x4B000006)", "quantizer, fast, 128x4"),
    (
        "ties of a code round up",
        "tl.fma(a, 2.0, 8388608.0)",
        "tl.fma(a, 2.0000002, 8388608.0)",
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
    (
        "ties of bf16 round up",
        "(bits + 0x7FFF + ((bits >> 16) & 1))",
        "(bits + 0x8000)",
        "grid",
    ),
)  # fmt: skip

_LAUNCHES: dict[str, tuple[Edit, ...]] = {
    "moe.py": (
        (
            "local expert offset ignored",
            "slots, tiles, local_expert_offset, num_local,",
            "slots, tiles, 0, num_local,",
            "deepseek",
        ),
        (
            "decoded weights: always of the first experts",
            "some = slice(expert, expert + at_once)",
            "some = slice(0, at_once)",
            "decoded",
        ),
        (
            "finalize: slots ascending for groups",
            'groups = split_k_groups(tokens, top_k, hidden_size) if order == "flashinfer" else 1',
            "groups = 1",
            "cancelling",
        ),
        (
            "intermediate not requantized",
            "    if plain:\n        x2 = operand",
            "    if not static:\n        x2 = operand",
            "qwen",
        ),
        ("up scalar for the gate", "experts.output1_scale_gate_scalar if first",
         "experts.output2_scale_scalar if first", "qwen"),
    ),
    "quantize.py": (
        (
            "base scale of requantization 1",
            "(k.PER_TOKEN, recipe.base_scale_inv) if per_token",
            "(k.PER_TOKEN, 1.0) if per_token",
            "qwen",
        ),
        (
            "base scale of e4m3_max 448 whatever the recipe",
            "values = x.new_empty((rows, 4, columns // 4), dtype=torch.bfloat16)\n",
            "values = x.new_empty((rows, 4, columns // 4), dtype=torch.bfloat16)\n"
            "    recipe = Recipe(recipe.math)\n",
            "4over6",
        ),
    ),
}  # fmt: skip


def _catalogue() -> Iterator[KernelMutant]:
    files = {
        "gemm_sums.py": _SUMS,
        "moe_gemm.py": _GEMM,
        "moe_kernels.py": _SMALL,
        "routing.py": _ROUTING,
        "quantize_kernel.py": _QUANTIZER,
        "leaves.py": _LEAVES,
        **_LAUNCHES,
    }
    for file, edits in files.items():
        for name, old, new, call in edits:
            yield KernelMutant(name, file, old, new, call)


KERNEL_MUTANTS = tuple(_catalogue())
