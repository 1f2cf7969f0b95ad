"""Configurations of the grouped GEMMs that were measured on this machine, kept on disk.

One JSON file a `Key`, in `gemm/` under `environment.cache_folder()`: `tuning.py` writes it, `moe.py`
asks for it. A key holds everything that makes other machine code of the same source, since compilers
have turned single configurations into wrong results without a word: an entry serves only kernels that
were compared with the table's when it was made. A process reads a file once; afterwards a look-up is
one of a dictionary, a miss no less than a hit.
"""

# SPDX-License-Identifier: Apache-2.0
import contextlib
import functools
import hashlib
import json
import logging
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

from ....reference.activation import ActivationType
from ....reference.weights.experts import Experts
from ... import environment, jit
from ...triton_target import arch, gpu_name, native_mma
from .. import grouped_gemm as moe_gemm
from ..call import Mode

_FORMAT = 1
"""Of an entry, and of what `moe.py` does with a configuration: another number is a miss."""
_log = logging.getLogger("nvfp4_moe")


@dataclass(frozen=True)
class GemmConfig:
    """Tiles of `expert_gemm_kernel`."""

    bm: int  # rows of weights, a power of two from 32; where it does not divide them, 128 does
    bn: int  # tokens
    bk: int  # columns of weights
    stages: int
    warps: int
    decoded: bool = False  # weights are decoded before, an expert's once
    registers: int | None = None  # of a thread, at most: more programs share a multiprocessor


Configs = tuple[GemmConfig, GemmConfig]
"""Of the two GEMMs of a call, whose `bn` is the same: it is the permutation's tile."""
_POWERS = {"bm": (32, 256), "bn": (16, 256), "bk": (64, 512), "warps": (1, 16)}
_STAGES = range(1, 9)
_TYPES = {"bm": int, "bn": int, "bk": int, "stages": int, "warps": int, "decoded": bool}
_REGISTERS = (None, 80, 128, 168)


@dataclass(frozen=True)
class Key:
    """What a measurement holds for."""

    gpu: str
    arch: int
    triton: str
    kernels: str  # digest of their source
    hidden: int  # padded, as `Experts` has them
    intermediate: int
    experts: int  # held here
    top_k: int
    activation: str
    mode: Mode
    optional: str  # the tensors of `Experts` that are not None, of those that may be
    slots: int  # T * K held here on average, rounded up to a power of two

    @property
    def weights(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(rows, columns) of each GEMM's."""
        rows = self.intermediate * (2 if ActivationType[self.activation].gated else 1)
        return (rows, self.hidden), (self.hidden, self.intermediate)

    @property
    def native(self) -> bool:
        """Whether the GPU multiplies codes."""
        return self.mode != "bf16" and native_mma(self.arch)


def key_of(experts: Experts, slots: int, top_k: int, mode: Mode) -> Key:
    """The key of a call with `slots` of T * K held here (`moe.held_slots`)."""
    device = experts.gemm1_weights.device
    names = ("gemm1_bias", "gemm2_bias", "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
    return Key(
        gpu_name(device), arch(device), triton.__version__, _digest(),
        experts.padded_hidden_size, experts.padded_intermediate_size, experts.num_local, top_k,
        experts.activation.name, mode,
        " ".join(name for name in names if getattr(experts, name) is not None),
        triton.next_power_of_2(slots),
    )  # fmt: skip


@functools.cache
def _digest() -> str:
    """Hash the kernel's source: what was measured and compared before a change says nothing after."""
    library = sorted(Path(jit.__file__ or "").parent.glob("*.py"))
    sources = [path.read_bytes() for path in (Path(moe_gemm.__file__ or ""), *library)]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]


def refusal(config: GemmConfig, columns: int, *, native: bool) -> str | None:
    """Why the kernel cannot run a configuration on weights of `columns`; None if it can.

    Whether its tiles fit a multiprocessor is for the GPU to say.
    """
    for name, (least, most) in _POWERS.items():
        value = getattr(config, name)
        if not least <= value <= most or value & (value - 1):
            return f"{name} is {value}; it must be a power of two from {least} to {most}"
    if config.stages not in _STAGES:
        return f"stages is {config.stages}; it must be {_STAGES[0]} to {_STAGES[-1]}"
    if config.registers not in _REGISTERS:
        return f"registers is {config.registers}; it must be one of {_REGISTERS}"
    if config.decoded and (native or columns % config.bk):
        return f"decoded weights need a bk that divides {columns} columns, and a GPU without NVFP4"
    return None


_known: dict[Key, Configs | None] = {}


def lookup(key: Key) -> Configs | None:
    """The tuned configurations; None where there are none, or none that can be trusted."""
    try:
        return _known[key]
    except KeyError:
        found = _known[key] = _read(key)
        return found


def store(key: Key, configs: Configs) -> Path | None:
    """Keep configurations: in this process and, where that is possible, on disk (its file).

    The file is replaced as a whole, so that processes may write and read the same one at once.
    """
    _known[key] = configs
    if (path := path_of(key)) is None:
        _log.warning("tuned configurations are not kept: no NVFP4_MOE_CACHE and no home directory")
        return None
    temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text_of(key, configs), "utf-8")
        temporary.replace(path)
    except OSError as error:
        _log.warning("tuned configurations are not kept: %s", error)
        with contextlib.suppress(OSError):
            temporary.unlink()
        return None
    return path


@contextlib.contextmanager
def using(key: Key, configs: Configs) -> Iterator[None]:
    """Within, calls of this key run these configurations; nothing is written."""
    before = lookup(key)
    _known[key] = configs
    try:
        yield
    finally:
        _known[key] = before


def path_of(key: Key) -> Path | None:
    """The entry's file; None without a cache folder."""
    folder = environment.cache_folder()
    name = hashlib.sha256(_json(asdict(key)).encode()).hexdigest()[:32]
    return None if folder is None else folder / "gemm" / f"{name}.json"


def text_of(key: Key, configs: Configs) -> str:
    """An entry; `check` is a digest of the rest, in which a changed digit shows."""
    content = {"format": _FORMAT, "key": asdict(key)}
    content |= {"gemm1": asdict(configs[0]), "gemm2": asdict(configs[1])}
    return json.dumps({**content, "check": _check(content)}, indent=1)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _check(content: dict[str, Any]) -> str:
    return hashlib.sha256(_json(content).encode()).hexdigest()


def _read(key: Key) -> Configs | None:
    if (path := path_of(key)) is None:
        return None
    try:
        return _parse(path.read_text("utf-8"), key)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        _log.warning("tuned configurations in %s are ignored: %s", path, error)
        return None


def _parse(text: str, key: Key) -> Configs:
    """Raises ValueError for what `text_of` did not write, or what the kernel cannot run."""
    entry = json.loads(text)
    if not isinstance(entry, dict) or entry.get("format") != _FORMAT:
        raise ValueError(f"not an entry of format {_FORMAT}")
    if entry.pop("check", None) != _check(entry):
        raise ValueError("its content does not fit its check sum")
    if entry.get("key") != asdict(key):
        raise ValueError("it is the entry of another key")
    first, second = (
        _config(entry.get(name), columns, native=key.native)
        for name, (_, columns) in zip(("gemm1", "gemm2"), key.weights, strict=True)
    )
    if first.bn != second.bn:
        raise ValueError(f"bn is {first.bn} and {second.bn}; the GEMMs of a call share it")
    return first, second


def _config(value: Any, columns: int, *, native: bool) -> GemmConfig:
    fields = dict(value) if isinstance(value, dict) else {}
    registers = fields.pop("registers", "missing")
    if {n: type(v) for n, v in fields.items()} != _TYPES or type(registers) is bool:
        raise ValueError(f"{value!r} is no configuration")
    config = GemmConfig(**fields, registers=registers)
    if (reason := refusal(config, columns, native=native)) is not None:
        raise ValueError(reason)
    return config
