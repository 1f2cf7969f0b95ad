"""Layers with the grouped GEMMs of other libraries, which serve some layers where they are installed."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from .bf16_weights import Quantized, Weights
from .case import NotHere, WrongResult


@dataclass(frozen=True)
class Library:
    """A library with a grouped GEMM."""

    module: str
    package: str
    version: str  # whose functions the adapter was written for
    capability: int  # the first compute capability that it is measured on; the major number
    newest: int  # the last one
    fewest_tokens: int = 1
    compiler: str | None = None  # a module that it finds installed only in the folders below


INSTALLED = ("site-packages", "dist-packages")


HUMMING, QUACK = "humming, W4A16", "quack, bf16"
LIBRARIES = {
    HUMMING: Library("humming", "humming-kernels", "0.1.19", 8, 12),
    QUACK: Library("quack", "quack-kernels", "0.6.5", 9, 9, fewest_tokens=128, compiler="cutlass"),
}
"""The libraries by the name of their backend."""


def versions() -> dict[str, str]:
    """Return the versions of the libraries that are installed, by package."""
    found = {}
    for library in LIBRARIES.values():
        with suppress(PackageNotFoundError):
            found[library.package] = version(library.package)
    return found


def refusal(
    name: str, *, tokens: int, swiglu: bool, local: bool, device: torch.device
) -> str | None:
    """Return why a library does not serve a layer here, or None.

    Args:
        name: a key of `LIBRARIES`.
        tokens: of a call.
        swiglu: the activation is SwiGLU.
        local: all experts are on this rank.
        device: where the layer is.
    """
    library = LIBRARIES[name]
    if find_spec(library.module) is None:
        return f"not installed: pip install {library.package}=={library.version}"
    if library.compiler and (reason := _misplaced(library.compiler)):
        return reason
    if not swiglu:
        return "it is measured in layers of SwiGLU alone"
    if not local:
        return "it is measured where all experts are local"
    if tokens < library.fewest_tokens:
        return f"it is measured from {library.fewest_tokens} tokens: its tiles have as many rows or more"
    if device.type != "cuda":
        return f"it needs a GPU, and the tensors are on the {device.type}"
    major = torch.cuda.get_device_capability(device)[0]
    if not library.capability <= major <= library.newest:
        needed = f"from {library.capability}.0 to below {library.newest + 1}.0"
        return f"it is measured on GPUs of compute capability {needed}"
    return None


def _misplaced(module: str) -> str | None:
    """Return why QuACK cannot make the key of a kernel that it compiles with this module, or None.

    The key has the names of installed functions, and the source and values of all others
    (`quack/gemm_runtime/identity.py`). It takes a function for installed by the path of its file. Some
    values of nvidia-cutlass-dsl have no key, so that QuACK raises a TypeError where it lies elsewhere.
    """
    found = find_spec(module)
    if found is None or found.origin is None or set(INSTALLED) & set(Path(found.origin).parts):
        return None
    folder = Path(found.origin).parent
    return f"{module} must be below a folder named {' or '.join(INSTALLED)}; it is {folder}"


@contextmanager
def running(name: str) -> Iterator[None]:
    """Turn the errors of a library's own code into the reason why it is not measured.

    Raises:
        NotHere: any error, but for missing memory and the findings of the benchmark.
    """
    try:
        yield
    except (NotHere, WrongResult, torch.OutOfMemoryError):
        raise
    except Exception as error:
        told = str(error).strip().partition("\n")[0]
        raise NotHere(
            f"{LIBRARIES[name].package} failed: {type(error).__name__}: {told}"
        ) from error


Call = Callable[[torch.Tensor, torch.Tensor], Callable[[], torch.Tensor]]
"""Chooses tiles for x [T, H] bf16 and logits [T, E] fp32, and returns the call that is measured."""


def humming(w13: Quantized, w2: Quantized, top_k: int) -> Call:
    """Lay weights out for humming, and return what makes a layer's call.

    Args:
        w13: N = 2 I, rows [up; gate], K = H.
        w2: N = H, K = I.
        top_k: experts of a token.
    """
    from . import humming_layer

    layer = humming_layer.prepare_layer(w13, w2)

    def prepare(x: torch.Tensor, logits: torch.Tensor) -> Callable[[], torch.Tensor]:
        plan = humming_layer.tune(x, logits, layer, top_k)
        return lambda: humming_layer.run(x, logits, layer, top_k, plan)

    return prepare


def quack(w: Weights, top_k: int) -> Call:
    """Lay weights out for QuACK, and return what makes a layer's call; biases are left out."""
    from . import quack_layer

    layer = quack_layer.prepare_layer(w.w13, w.w2)

    def prepare(x: torch.Tensor, logits: torch.Tensor) -> Callable[[], torch.Tensor]:
        tiles = quack_layer.tune(x, logits, layer, top_k)
        return lambda: quack_layer.run(x, logits, layer, top_k, tiles)

    return prepare
