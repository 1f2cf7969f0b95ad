"""Compile FlashInfer 0.7.4's `rmsnorm_fp4quant` for sm_90a, without a GPU and without nvcc.

    make rmsnorm-kernels

The kernel needs sm_100 for one instruction alone, `cvt.rn.satfinite.e2m1x2.f32`. Integers replace it
here: the bits of |x| are compared with those of the seven midpoints, and a tie goes to the even code.
The folder in the argument receives a cubin of every shape and `index.json`, which `rmsnorm.run` reads.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import importlib
import json
import re
from pathlib import Path
from typing import Any

import cutlass
import offline_cutlass
from cutlass._mlir.dialects import llvm

SHAPES = {
    "bf16-256": (256, False, False),
    "bf16-4096-128x4": (4096, False, True),
    "fp16-1024": (1024, True, False),
}
"""Hidden size, whether x is fp16, and whether the block scales lie in the 128x4 layout."""
CONVERSION = re.compile(r"cvt\.rn\.satfinite\.e2m1x2\.f32\s+(\S+),\s*(\S+),\s*(\S+);")
MIDPOINTS = (
    (0x3E800000, "gt"), (0x3F400000, "ge"), (0x3FA00000, "gt"), (0x3FE00000, "ge"),
    (0x40200000, "gt"), (0x40600000, "ge"), (0x40A00000, "gt"),
)  # fmt: skip
"""0.25, 0.75, 1.25, 1.75, 2.5, 3.5 and 5 in fp32, and the comparison that counts a code more."""


def _code(source: str, register: str) -> str:
    """PTX that leaves the e2m1 code of an fp32 register in an integer register."""
    text = f"mov.b32 ea, {source}; shr.u32 {register}, ea, 31; shl.b32 {register}, {register}, 3; "
    text += "and.b32 ea, ea, 0x7fffffff; "
    for bits, comparison in MIDPOINTS:  # a true comparison is -1
        text += f"set.{comparison}.s32.s32 ec, ea, {bits}; sub.s32 {register}, {register}, ec; "
    return text


def in_integers(text: str) -> str:
    """Return inline PTX without the conversion to e2m1."""

    def pair(found: re.Match[str]) -> str:
        byte, high, low = found.groups()
        codes = _code(high, "eh") + _code(low, "el")
        return f"{codes}shl.b32 eh, eh, 4; or.b32 el, el, eh; cvt.u8.u32 {byte}, el;"

    text, count = CONVERSION.subn(pair, text)
    if "e2m1" in text:
        raise RuntimeError(f"a conversion that is not known: {text}")
    return text.replace("{", "{ .reg .b32 ea, ec, eh, el; ", 1) if count else text


class _Dialect:
    """The llvm dialect of MLIR, whose inline PTX knows no e2m1."""

    def __getattr__(self, name: str) -> Any:
        return getattr(llvm, name)

    def inline_asm(self, result: Any, operands: Any, text: str, *args: Any, **keywords: Any) -> Any:
        return llvm.inline_asm(result, operands, in_integers(text), *args, **keywords)


def main() -> None:
    """Compile every shape into the folder that the argument names."""
    parser = argparse.ArgumentParser(description="Compile FlashInfer's rmsnorm for sm_90a.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    offline_cutlass.pretend_hopper()
    # `flashinfer.cute_dsl` has functions of these modules' names.
    importlib.import_module("flashinfer.cute_dsl.fp4_common").llvm = _Dialect()  # type: ignore[attr-defined]
    source = importlib.import_module("flashinfer.cute_dsl.rmsnorm_fp4quant")
    index = []
    for name, (hidden, is_fp16, swizzled) in SHAPES.items():
        dtype = cutlass.Float16 if is_fp16 else cutlass.BFloat16
        kernel = source.RMSNormFP4QuantKernel(dtype, hidden, 16, swizzled, is_fp16, 90, "e4m3")
        call = (hidden, 16, is_fp16, 90, "e4m3", swizzled, False)
        kernels = offline_cutlass.compiled(source._get_compiled_kernel, *call)
        (entry,) = offline_cutlass.write(kernels, folder / f"{name}.cubin")
        index.append(
            {
                **{"name": name, "hidden": hidden, "fp16": is_fp16, "swizzled": swizzled},
                **{"entry": entry, "threads": kernel.num_threads, "rows": kernel.rows_per_block},
                "shared": kernel._smem_size_in_bytes(),
            }
        )
    (folder / "index.json").write_text(json.dumps(index, indent=1))


if __name__ == "__main__":
    main()
