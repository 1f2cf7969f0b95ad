"""Mutants that compilation for sm_90 decides, without a GPU: Gluon's, and what is open of Triton's.

A mutant that does not compile is caught. One with the machine code of the unchanged kernel in every call
of its probes is one that no probe can see: on a GPU it survives. Any other waits for a GPU.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pretend_gpu
import pytest
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from nvfp4_moe.kernels import launcher

from . import kernel_probes
from .trial import Probe

ARCH = 90
_SHARED_BYTES = 227 << 10
"""A program on sm_90 has so much shared memory at most."""
WAITS = "a GPU decides"
"""A probe says so of a mutant with other machine code."""
_OF_GLUON, _OF_COMPILATION = "ring", "compiled"
"""How the names of probes begin whose calls launch a Gluon kernel, and of those that compile alone."""
_TOO_LARGE = "far"
"""Calls with this in their name take gigabytes; others compile the same kernels."""
_OF_FORM: dict[str, Probe] = {}
"""The probe of a form, for all files: two of them may launch it."""
_run = triton.JITFunction.run
_LOCATIONS = re.compile(r" ?loc\(.*?\)$|^#loc.*$", re.MULTILINE)


class _Driver:
    """As much of a driver as Triton needs to compile for a GPU that is not here."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _SameCode(Exception):
    """The compiler has come to the same program, which it can but compile to the same code."""


@dataclass(frozen=True)
class Launch:
    """A kernel, with arguments that it is compiled for."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def form(self) -> str:
        """All that compilation depends on, beside the source."""
        params = zip(self.args, self.kernel.params, strict=False)
        args = (_form(a, fixed=p.do_not_specialize) for a, p in params)
        return f"{self.kernel.__name__} {', '.join(args)} {sorted(self.options.items())}"

    def compile(self, known: Callable[[str], bool] = lambda program: False) -> tuple[str, str]:
        """Compile without a launch.

        Args:
            known: asked of the digest of the program that the kernel's optimizer makes, before it
                becomes machine code.

        Returns:
            Digests of that program and of the machine code.

        Raises:
            _SameCode: `known` is true.
            OutOfResources: no program would fit, as a launch says.
        """
        programs = []
        stages_of = CUDABackend.add_stages

        def add_stages(backend: Any, stages: dict[str, Any], *args: Any) -> None:
            stages_of(backend, stages, *args)
            optimize = stages["ttgir"]

            def optimized(src: Any, metadata: Any) -> Any:
                module = optimize(src, metadata)
                programs.append(_digest(_LOCATIONS.sub("", str(module)).encode()))
                if known(programs[-1]):
                    raise _SameCode
                return module

            stages["ttgir"] = optimized

        with mock.patch.object(CUDABackend, "add_stages", add_stages):
            done = self._compiled()
        if done.metadata.shared > _SHARED_BYTES:
            raise OutOfResources(done.metadata.shared, _SHARED_BYTES, "shared memory")
        return programs[0], _digest(done.asm["cubin"])

    def barriers(self) -> int:
        """Compile without a launch; return how many barriers the kernel initializes."""
        with offline():
            initialized: int = self._compiled().asm["ptx"].count("mbarrier.init")
        return initialized

    def _compiled(self) -> Any:
        """Compile anew, without a launch."""
        self.kernel.device_caches.clear()
        return _run(self.kernel, *self.args, **self.options, grid=None, warmup=True)


def _form(value: Any, *, fixed: bool) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {value.data_ptr() % 16}"
    if isinstance(value, int):
        return "int" if fixed else "1" if value == 1 else f"int {value % 16 == 0}"
    return str(getattr(value, "kind", value))


def _digest(text: bytes) -> str:
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def launches(name: str) -> list[Launch]:
    """Return the launches in a probe's call, each form once; of a ring those of Gluon kernels alone."""
    found: dict[str, Launch] = {}
    of_gluon = name.startswith(_OF_GLUON)

    def noted(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if kernel.is_gluon() or not of_gluon:
            launch = Launch(kernel, args, options)
            found.setdefault(launch.form, launch)
        return pretend_gpu.Compiled([])

    with pytest.MonkeyPatch.context() as patch:
        pretend_gpu.present(patch)
        patch.setattr(triton.JITFunction, "run", noted)
        patch.setattr(launcher, "_LAUNCHES", {})
        with suppress(IndexError, RuntimeError):  # of results that no kernel has written
            kernel_probes.call(name).answer("cpu")
    return list(found.values())


def is_of_gluon(file: str) -> bool:
    """Return True for a module of Gluon's kernels, which only a GPU of sm_90 runs."""
    return any(name.startswith(_OF_GLUON) for name in kernel_probes.OF_FILE.get(file, ()))


@contextmanager
def offline() -> Iterator[None]:
    """Within, Triton compiles for sm_90 without a GPU, and anew each time."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", _Driver()))
        stack.enter_context(knobs.compilation.scope())
        knobs.compilation.always_compile = True
        knobs.compilation.disable_line_info = True
        yield


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []
"""The folder of `_digests`. It is in no cache: a child that empties one would remove the folder."""


def _digests() -> str:
    """Return the folder in which processes find what the unchanged kernels are compiled to."""
    if not _FOLDERS:
        _FOLDERS.append(tempfile.TemporaryDirectory())
    return _FOLDERS[0].name


def probes(file: str) -> dict[str, Probe]:
    """Return a probe for each form of a kernel that the probes of a file launch on sm_90.

    Its first run, of unchanged code, keeps the digests with which later ones compare. Probes that only
    compile are asked as they are.
    """
    found: dict[str, Probe] = {}
    for name in kernel_probes.asked(file, "cuda"):
        if name.startswith(_OF_COMPILATION):
            found[name] = kernel_probes.probe(name, "cuda")
        elif _TOO_LARGE not in name:
            for launch in launches(name):
                path = Path(_digests(), _digest(launch.form.encode()))
                probe = functools.partial(_compared, launch, path)
                found[launch.form] = _OF_FORM.setdefault(launch.form, probe)
    return found


def _compared(launch: Launch, path: Path) -> Iterator[str]:
    """Yield what is wrong: it does not compile, or its code is not that of the unchanged kernel."""
    right = path.read_text("utf-8").split() if path.exists() else None
    try:
        with offline():
            program, code = launch.compile(lambda program: bool(right) and program == right[0])
    except _SameCode:
        return
    except (OSError, MemoryError) as error:  # of this machine, not of the mutant
        yield f"{WAITS}: {error}"
        return
    except Exception as error:
        yield f"{type(error).__name__}: {error}"
        return
    if right is None:
        path.write_text(f"{program} {code}", "utf-8")
    elif code != right[1]:
        yield WAITS
