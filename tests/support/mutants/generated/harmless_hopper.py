"""Generated mutants of the GEMMs for sm_90 that nothing can catch, and why."""

# SPDX-License-Identifier: Apache-2.0

OF_HOPPER: dict[str, tuple[str, ...]] = {
    "A tile half as wide is taken where it holds the rows, or not at all; the sums are the same.": (
        "kernels expert_gemm_kernel: operator: BN >= 32 and (not NATIVE) and (w_ptr.dtype.element_ty "
        "!= tl.bfloat16) -> BN >= 32 or not NATIVE or w_ptr.dtype.element_ty != tl.bfloat16",
        "kernels expert_gemm_kernel: comparison: BN >= 32 -> BN > 32",
        "kernels expert_gemm_kernel: constant: BN >= 32 -> BN >= 33",
        "kernels expert_gemm_kernel: operator: not NATIVE -> NATIVE",
        "kernels expert_gemm_kernel: comparison: rows <= BN // 2 -> rows < BN // 2",
        "kernels expert_gemm_kernel: operator: BN // 2 -> BN % 2",
        "kernels expert_gemm_kernel: constant: BN // 2 -> BN // 3",
        "kernels expert_gemm_kernel: comparison: w_ptr.dtype.element_ty != tl.bfloat16 -> "
        "w_ptr.dtype.element_ty == tl.bfloat16",
    ),
    "That tile has codes; the place is of decoded weights, whose tile is whole.": (
        "kernels expert_gemm_kernel: operator: expert - first_expert -> expert + first_expert",
    ),
    "Columns behind K are made zero, and rows that are not live go nowhere.": (
        "kernels rows_kernel: constant: 0.0 -> 1.0",
        "kernels prologue_kernel: constant: 0.0 -> 1.0",
    ),
    "How many results are finished at a time changes none of them.": (
        "kernels tokens_at_once: constant: 4096 * 8 -> 4097 * 8",
        "kernels tokens_at_once: constant: 4096 * 8 -> 4096 * 9",
    ),
    "There are three bases, which the slice gives with either end.": (
        "kernels word_layout: constant: 3 if rows == ROWS.value else 2 -> 4 if rows == ROWS.value else "
        "2",
    ),
    "The second number of the version is not read: Triton gives the same code.": (
        "kernels sums_layout: constant: [3, 0] -> [3, 1]",
    ),
    "Nothing uses what is loaded for one group more: Triton leaves it out and gives the same code.": (
        "kernels _load_groups: index: gl.static_range(GROUPS) -> gl.static_range(GROUPS + 1)",
    ),
    "Codes are loaded earlier, as with AHEAD, but behind the wait for their stage, which is released "
    "after its step: the same operands in the same order.": (
        "kernels ring_sums: constant: GROUPS if AHEAD else 1 -> GROUPS if AHEAD else 2",
    ),
    "No stage is released in the first step, and each step sets the next one.": (
        "kernels ring_sums: constant: 0 -> 1 (2)",
    ),
    "The rows of all experts are fewer than 2^31, since TMA's coordinates have 32 bits.": (
        "kernels _consume: rounding: expert.to(gl.int64) -> expert",
    ),
    "K is a multiple of 16, so that there are as many steps.": (
        "kernels expert_gemm_kernel: constant: K + GROUPS * 128 - 1 -> K + GROUPS * 128 - 2",
        "kernels dense_gemm_kernel: constant: K + GROUPS * 128 - 1 -> K + GROUPS * 128 - 2",
    ),
    "A step more multiplies zeros: TMA gives them beyond K in weights, and in rows of tokens, too.": (
        "kernels dense_gemm_kernel: operator: K + GROUPS * 128 - 1 -> K + GROUPS * 128 + 1",
        "kernels dense_gemm_kernel: constant: GROUPS * 128 -> GROUPS * 129",
    ),
    "A tile behind the last has no tokens, and of a strip behind the last no column is stored. All "
    "programs divide the work by one number.": (
        "kernels _share: operator: total - gl.program_id(0) + programs - 1 -> total - gl.program_id(0) "
        "+ programs + 1",
        "kernels _share: operator: total - gl.program_id(0) -> total + gl.program_id(0)",
        "kernels _share: constant: 0 -> 1 (2)",
        "kernels _share: constant: gl.program_id(0) -> gl.program_id(1) (3)",
        "kernels _share: operator: total - turns * programs -> total + turns * programs",
        "kernels _share: operator: turns * programs -> turns / programs",
        "kernels dense_gemm_kernel: operator: N + R - 1 -> N + R + 1",
        "kernels dense_gemm_kernel: operator: M + WIDEST - 1 -> M + WIDEST + 1",
    ),
    "Programs then take all tiles in turn and share none: the same sums.": (
        "kernels _share: constant: gl.num_programs(0) -> gl.num_programs(1)",
    ),
    "A program then makes tiles from their first step that it ends, or that others make too: the same "
    "sums.": (
        "kernels _share: constant: gl.program_id(0) -> gl.program_id(1)",
        "kernels _piece: comparison: behind >= 0 -> behind > 0",
        "kernels _piece: constant: behind >= 0 -> behind >= 1",
    ),
    "A width is a multiple of 8: it has none of the bits 0 and 1, and 1 or 2 less have as many bits.": (
        "kernels parts_of: operator: -1 -> 1",
        "kernels power_of_2: constant: width - 1 -> width - 2",
    ),
    "A width has no bit above its highest.": (
        "kernels parts_of: operator: width.bit_length() - 1 -> width.bit_length() + 1",
    ),
    "Any number but 0 says that sums are handed over.": (
        "kernels _hand_over: constant: gl.atomic_xchg(ready_ptr + gl.program_id(0), 1, sem='release', "
        "scope='gpu') -> gl.atomic_xchg(ready_ptr + gl.program_id(0), 2, sem='release', scope='gpu')",
    ),
    "It is added to zeros of int64.": (
        "kernels rows_kernel: rounding: tl.program_id(0).to(tl.int64) -> tl.program_id(0)",
        "kernels prologue_kernel: rounding: token.to(tl.int64) -> token",
    ),
    "Both rows are the same one.": (
        "kernels rows_kernel: constant: (1, 1) -> (2, 1)",
        "kernels slot_places: constant: (1, 1) -> (2, 1)",
    ),
    "Triton adds, subtracts and compares a truth value and an int32 as two int32.": (
        "kernels _pieces: rounding: (end % steps > 0).to(gl.int32) -> end % steps > 0",
        "kernels _piece: rounding: (end % steps > 0).to(gl.int32) -> end % steps > 0",
    ),
    "The assembly reads the low 16 bits of its register alone.": (
        "kernels _scale_pairs: rounding: scales.to(gl.int32) -> scales",
    ),
    "The buffer and what is stored in it have that size, no smaller than the width. Of what is stored "
    "only the tile's tokens are read, and only theirs are loaded.": (
        "kernels power_of_2: constant: 1 << (width - 1).bit_length() -> 2 << (width - 1).bit_length()",
    ),
    "The fragment that is waited for is assigned anew before it is read.": (
        "kernels _wait: constant: -1 -> -2 (2)",
        "kernels _wait: operator: -1 -> 1 (2)",
    ),
    "A tile is multiplied at each width that holds its rows, or at one of them, to the same bits.": (
        "kernels narrower: constant: i + 1 -> i + 2",
        "kernels narrower: operator: i + 1 -> i - 1 (2)",
    ),
    "A layout says which thread and which address has an element, and changes no result.": (
        "kernels results_layout: constant: [8, 1] -> [8, 2]",
        "kernels _consume: constant: [1] -> [2]",
        "kernels _consume_dense: constant: [1] -> [2]",
        "kernels clear_kernel: constant: [1] -> [2]",
        "kernels expert_gemm_kernel: constant: gl.SwizzledSharedLayout(1, 1, 1, [0]) -> "
        "gl.SwizzledSharedLayout(2, 1, 1, [0])",
        "kernels expert_gemm_kernel: constant: gl.SwizzledSharedLayout(1, 1, 1, [0]) -> "
        "gl.SwizzledSharedLayout(1, 2, 1, [0])",
        "kernels expert_gemm_kernel: constant: gl.SwizzledSharedLayout(1, 1, 1, [0]) -> "
        "gl.SwizzledSharedLayout(1, 1, 2, [0])",
        "kernels expert_gemm_kernel: constant: gl.SwizzledSharedLayout(1, 1, 1, [0]) -> "
        "gl.SwizzledSharedLayout(2, 1, 1, [0]) (2)",
        "kernels expert_gemm_kernel: constant: gl.SwizzledSharedLayout(1, 1, 1, [0]) -> "
        "gl.SwizzledSharedLayout(1, 2, 1, [0]) (2)",
        "kernels expert_gemm_kernel: constant: gl.SwizzledSharedLayout(1, 1, 1, [0]) -> "
        "gl.SwizzledSharedLayout(1, 1, 2, [0]) (2)",
        "kernels dense_gemm_kernel: constant: gl.SwizzledSharedLayout(1, 1, 1, [0]) -> "
        "gl.SwizzledSharedLayout(2, 1, 1, [0])",
        "kernels dense_gemm_kernel: constant: gl.SwizzledSharedLayout(1, 1, 1, [0]) -> "
        "gl.SwizzledSharedLayout(1, 2, 1, [0])",
        "kernels dense_gemm_kernel: constant: gl.SwizzledSharedLayout(1, 1, 1, [0]) -> "
        "gl.SwizzledSharedLayout(1, 1, 2, [0])",
    ),
    "Columns are 64 or 128: the quotient by 8 or 16 is the same.": (
        "kernels results_layout: constant: 32 // lanes -> 33 // lanes",
    ),
    "The producer's registers and warps change no result: a thread of it starts the copies.": (
        "kernels expert_gemm_kernel: constant: [24, 24, 24, 24] -> [25, 24, 24, 24]",
        "kernels dense_gemm_kernel: constant: [1] -> [2]",
        "kernels dense_gemm_kernel: constant: [24] -> [25]",
    ),
    "All programs then write the ids to one place, and they are the same.": (
        "kernels prologue_kernel: constant: tl.program_id(0) -> tl.program_id(1)",
    ),
    "The slots of the expert behind the last local one come before no local slot.": (
        "kernels slot_places: comparison: local < E -> local <= E",
    ),
    "The row of that expert's slot goes behind those of the local slots, where nobody reads.": (
        "kernels slot_places: comparison: own < E -> own <= E",
    ),
}
"""Keys of `rules.Generated`, by reason."""
