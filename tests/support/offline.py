"""Compiling a Triton kernel for a GPU that is not here, and what its machine code says."""

# SPDX-License-Identifier: Apache-2.0
import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compile_kernel(function, arch: int, types: dict, constants: dict, aligned, **options):
    """The compiled kernel; `aligned` names the arguments that are multiples of 16."""
    names = [p.name for p in function.params]
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    if getattr(function, "is_gluon", bool)():
        from triton.experimental.gluon._runtime import GluonASTSource as Source
    else:
        Source = ASTSource
    source = Source(function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"enable_fp_fusion": False} | options
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def tensor_descriptor(dtype: str, box: tuple[int, ...], swizzle: int) -> str:
    """Return the type of a kernel's TMA descriptor, of "bf16" or "i32"."""
    from triton.experimental.gluon import language as gl

    layout = gl.NVMMASharedLayout(swizzle, {"bf16": 16, "i32": 32}[dtype], rank=len(box))
    return f"tensordesc<{dtype}{list(box)},{layout!r}>"


def tool(kernel, tmp_path: Path, name: str, *options: str) -> str:
    """Return what a disassembler of Triton prints for the kernel."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run(
        [path, *options, cubin], capture_output=True, text=True, check=True
    ).stdout


def assembler_log(kernel, tmp_path: Path, arch: str) -> str:
    """Return what Triton's ptxas says of the kernel: registers, spills and warnings."""
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(kernel.asm["ptx"])
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    ran = subprocess.run(
        [path, f"-arch={arch}", "-v", ptx, "-o", tmp_path / "checked.cubin"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return ran.stdout + ran.stderr


def disassemble(kernel, tmp_path: Path) -> str:
    return tool(kernel, tmp_path, "nvdisasm", "-c")


def resources(kernel, tmp_path: Path) -> tuple[int, int]:
    """Return the bytes of stack, and how many instructions load and store local memory.

    A kernel without local memory has none, and is not disassembled, which takes as long as compilation.
    """
    usage = tool(kernel, tmp_path, "cuobjdump", "-res-usage")
    found = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found, usage
    stack, local = map(int, found.groups())
    if stack == local == 0:
        return 0, 0
    return stack, len(re.findall(r"\b(?:LDL|STL)\b", disassemble(kernel, tmp_path)))


def wgmma_of(kernel) -> Counter:
    """Count the kernel's wgmma instructions by their tokens."""
    form = r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.bf16\.bf16"
    return Counter(map(int, re.findall(form, kernel.asm["ptx"])))


def wgmma_of_widths(widths: Sequence[int], groups: int) -> Counter:
    """Count those of tiles of these widths: for each part eight, of 16 columns, in 128 columns."""
    parts = Counter(1 << bit for width in widths for bit in range(9) if width >> bit & 1)
    return Counter({part: 8 * groups * count for part, count in parts.items()})
