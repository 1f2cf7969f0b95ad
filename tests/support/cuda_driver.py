"""The functions of the CUDA driver that load and launch a compiled kernel on torch's tensors.

The kernels of FlashInfer that nvidia-cutlass-dsl compiles are run with these, so that a machine with a
GPU needs torch alone.
"""

# SPDX-License-Identifier: Apache-2.0
import ctypes
import sys
from pathlib import Path
from typing import Any

import torch


def with_rows(tensor: torch.Tensor) -> bytes:
    """Return the argument of a tensor whose number of rows is dynamic: its pointer, then the number."""
    pointer, rows = tensor.data_ptr(), tensor.shape[0]
    return pointer.to_bytes(8, "little") + rows.to_bytes(8, "little")


class Driver:
    """A failure ends the run with the driver's own words."""

    def __init__(self) -> None:
        torch.zeros(
            1, dtype=torch.float32, device="cuda"
        )  # makes the context that the driver needs
        self._cuda = ctypes.CDLL("libcuda.so.1")

    def _check(self, code: int, action: str) -> None:
        if code:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(code, ctypes.byref(text))
            sys.exit(f"{action}: {code} {(text.value or b'').decode()}")

    def load(self, cubin: Path) -> ctypes.c_void_p:
        """Load a cubin. If the driver refuses it, load the PTX beside it as version 9.0."""
        module = ctypes.c_void_p()
        code = self._cuda.cuModuleLoadData(ctypes.byref(module), cubin.read_bytes())
        if code:
            print(f"{cubin.name}: error {code}; its PTX is loaded as version 9.0")
            text = cubin.with_suffix(".ptx").read_text()
            version = next(line for line in text.splitlines() if line.startswith(".version"))
            ptx = text.replace(version, ".version 9.0").encode() + b"\0"
            self._check(self._cuda.cuModuleLoadData(ctypes.byref(module), ptx), "load the PTX")
        return module

    def launch(
        self,
        module: ctypes.c_void_p,
        entry: str,
        grid: int,
        threads: int,
        shared: int,
        *arguments: Any,
    ) -> None:
        """Launch an entry, and wait for it.

        Args:
            shared: bytes of shared memory.
            arguments: CUDA tensors, of which the kernel gets the pointers; int and float, of 32 bits;
                bytes, which are passed as they are.
        """
        function = ctypes.c_void_p()
        found = self._cuda.cuModuleGetFunction(ctypes.byref(function), module, entry.encode())
        self._check(found, entry)
        values = [_value(argument) for argument in arguments]
        places = [ctypes.cast(ctypes.byref(value), ctypes.c_void_p) for value in values]
        pointers = (ctypes.c_void_p * len(places))(*places)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        started = self._cuda.cuLaunchKernel(
            function, grid, 1, 1, threads, 1, 1, shared, stream, pointers, None
        )
        self._check(started, f"launch {entry}")
        torch.cuda.synchronize()


def _value(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, bytes):
        return (ctypes.c_char * len(argument))(*[bytes([byte]) for byte in argument])
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int32(argument)
