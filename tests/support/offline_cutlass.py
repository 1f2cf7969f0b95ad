"""Compile FlashInfer's CuTe-DSL kernels for sm_90a, without a GPU and without nvcc.

FlashInfer compiles with nvidia-cutlass-dsl (4.8.1 was used), and asks torch for a GPU first. Functions
of torch answer in a GPU's place, the kernels are kept, and nothing is launched. `CUTE_DSL_DUMP_DIR` must
name a folder.
"""

# SPDX-License-Identifier: Apache-2.0
import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cutlass.cute as cute
import flashinfer
import torch

VERSION = "0.7.4"


class _Compiled(BaseException):
    """Ends FlashInfer's function before it launches."""

    def __init__(self, kernels: Any):
        self.kernels = kernels


def pretend_hopper() -> None:
    """Let torch and CuTe DSL answer for an H200. `compiled` then returns what they compile."""
    if flashinfer.__version__ != VERSION:
        raise SystemExit(f"flashinfer-python is {flashinfer.__version__}; {VERSION} is needed")
    torch.cuda.device = lambda device: contextlib.nullcontext()
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    shared = SimpleNamespace(shared_memory_per_block_optin=232448)  # bytes
    torch.cuda.get_device_properties = lambda device=None: shared
    real, stream = cute.compile, cute.runtime.make_fake_stream

    def keep(*args: Any, options: str, **keywords: Any) -> None:
        arch = "" if "--gpu-arch" in options else "--gpu-arch sm_90a"
        kept = real(*args, options=f"{options} {arch} --keep-ptx --keep-cubin", **keywords)
        if ".target sm_90a" not in kept.__ptx__:
            raise RuntimeError("the kernel was not compiled for sm_90a")
        raise _Compiled(kept)

    cute.compile = keep
    cute.runtime.make_fake_stream = lambda **_: stream()  # TVM's FFI would look for a GPU's stream


def compiled(function: Callable[..., Any], *args: Any) -> Any:
    """Return what FlashInfer's function compiles first, with `__cubin__` and `__ptx__`."""
    try:
        function(*args)
    except _Compiled as end:
        return end.kernels
    raise RuntimeError(f"FlashInfer's {function} returned without a call of cute.compile")


def write(kernels: Any, cubin: Path) -> list[str]:
    """Write a cubin, and its PTX beside it. Return the names of its entries."""
    cubin.write_bytes(kernels.__cubin__)
    cubin.with_suffix(".ptx").write_text(kernels.__ptx__)
    print(f"{cubin.stem}: {len(kernels.__cubin__)} bytes")
    lines = [line for line in kernels.__ptx__.splitlines() if ".visible .entry" in line]
    return [line.split(".entry ")[1].split("(")[0] for line in lines]
