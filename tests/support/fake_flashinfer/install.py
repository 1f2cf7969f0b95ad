"""Put the fake FlashInfer in the place of FlashInfer's compiled modules, and take it out again."""

# SPDX-License-Identifier: Apache-2.0
import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from nvfp4_moe.kernels import backends
from nvfp4_moe.kernels import device as gpu_device
from nvfp4_moe.kernels.flashinfer import version

from .behaviour import Behaviour
from .faults import FAULTS
from .layers import CuteDsl, Cutlass, Kernels, Ran, Trtllm
from .quantizers import Quantizers

CAPABILITY = (10, 0)


@dataclass(frozen=True)
class FakeFlashInfer:
    ran: list[Ran]
    """Every layer that has run, with its tactic."""


@contextlib.contextmanager
def installed(fault: str | None = None) -> Iterator[FakeFlashInfer]:
    """Within, CPU tensors count as a Blackwell GPU's, and FlashInfer's kernels run on them.

    Args:
        fault: one of `FAULTS`; None for none.
    """
    if fault is not None and fault not in FAULTS:
        raise ValueError(f"fault is {fault!r}; it must be one of {', '.join(FAULTS)}")
    behaviour = Behaviour() if fault is None else FAULTS[fault].behaviour
    kernels = Kernels(behaviour)
    with ExitStack() as stack:

        def replace(target: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(target, name, value))

        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # for many small operations, which processes share processors for
        _pretend_a_gpu(replace)
        _replace_quantizers(replace, Quantizers(behaviour))
        _replace_layers(replace, kernels)
        yield FakeFlashInfer(kernels.ran)


def _pretend_a_gpu(replace: Any) -> None:
    of_device, in_cuda, guard = gpu_device.of_device, torch.Tensor.cuda, torch.cuda.device

    def on_cpu(device: Any) -> bool:
        return (
            torch.device(device).type == "cpu" if isinstance(device, str | torch.device) else False
        )

    replace(gpu_device, "of_device", lambda d: CAPABILITY if on_cpu(d) else of_device(d))
    replace(torch.Tensor, "cuda", lambda t, *a, **k: t if on_cpu(t.device) else in_cuda(t, *a, **k))
    replace(torch.cuda, "device", lambda d: contextlib.nullcontext() if on_cpu(d) else guard(d))
    refusal = backends.triton_refusal_of

    @functools.wraps(refusal)
    def without_triton(t: torch.Tensor, what: str, asked: tuple[int, int] | None) -> str | None:
        return refusal(t, what, None if on_cpu(t.device) else asked)

    replace(backends, "triton_refusal_of", without_triton)


def _replace_quantizers(replace: Any, ours: Quantizers) -> None:
    from flashinfer.experimental.cake_nvfp4_per_token import cake_backend
    from flashinfer.quantization import fp4_quantization as wrappers
    from flashinfer.quantization import fp8_quantization as fp8_wrappers
    from flashinfer.quantization.kernels import nvfp4_quantize as cute_dsl

    replace(version, "HERE", dataclasses.replace(version.HERE, has_cake_programs=True))
    replace(wrappers, "get_fp4_quantization_module", ours.module)
    replace(wrappers, "get_compute_capability", lambda device: CAPABILITY)
    if version.HERE.described_as in version.SINCE_NEW:  # they ask for the device of a GPU
        replace(torch.cuda, "current_device", lambda: 0)
        replace(wrappers, "_check_block_scale_quantization_support", lambda *_: None)
    for name in ("nvfp4_quantize_per_token_cute_dsl", "nvfp4_quantize_cute_dsl"):
        replace(cute_dsl, name, getattr(ours, name))
    replace(cake_backend, "nvfp4_quantize_per_token", ours.cake)
    module = SimpleNamespace(mxfp8_quantize_sm100=ours.mxfp8)
    replace(fp8_wrappers, "get_mxfp8_quantization_sm100_module", lambda: module)


def _replace_layers(replace: Any, kernels: Kernels) -> None:
    from flashinfer.fused_moe import core
    from flashinfer.fused_moe.cute_dsl import fused_moe as cute_dsl

    def built(module: Any) -> Any:
        return SimpleNamespace(build_and_load=lambda: module, get_library_paths=lambda: [])

    replace(core, "get_compute_capability", lambda device: CAPABILITY)
    trtllm, cutlass = Trtllm(kernels), Cutlass(kernels)
    replace(core, "gen_trtllm_gen_fused_moe_sm100_module", lambda **_: built(trtllm))
    replace(core, "gen_cutlass_fused_moe_sm100_module", lambda *_: built(cutlass))
    # Their own functions, but for the cache that they keep of real modules.
    ours = functools.cache(core._get_trtllm_moe_sm100_module_impl.__wrapped__)
    replace(core, "get_trtllm_moe_sm100_module", lambda: ours(False))
    replace(
        core,
        "get_cutlass_fused_moe_module",
        functools.cache(core.get_cutlass_fused_moe_module.__wrapped__),
    )
    replace(cute_dsl, "_moe_core_impl", CuteDsl(kernels).core)
    replace(cute_dsl, "_require_cute_dsl_arch_for", lambda device, **_: None)
