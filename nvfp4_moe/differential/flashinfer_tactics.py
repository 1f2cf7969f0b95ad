"""Every kernel that a backend can choose for a fused call, and each of them by force.

FlashInfer's layers all ask `AutoTuner.choose_one(op, runners, config, inputs)` for a runner and a
tactic; untuned, that is the first runner and -1. Here it is replaced: once to note what each question
could have been answered with, in the words of the tuner itself (its profile for these inputs, its
made-up tensors of that profile, its list of blocked tactics), and then to give one of those answers.
The Triton backend has its table of tiles.
"""

# SPDX-License-Identifier: Apache-2.0
import contextlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from unittest import mock

from ..kernels.flashinfer import autotuner
from ..kernels.flashinfer.autotuner import UNTUNED
from ..kernels.moe.backends import FUSED_MOE
from ..kernels.moe.call import MoECall

if TYPE_CHECKING:
    from ..kernels.moe.tile_table import Configs
    from ..kernels.tiles import GemmConfig

DEFAULT = "default"


@dataclass(frozen=True)
class Tactic:
    """An answer of the tuner to one of its questions; -1 to the others."""

    name: str
    op: str | None = None  # who asks; None: -1 for all
    runner: int = 0  # its place among the runners
    value: Any = field(default=UNTUNED, compare=False)


@dataclass(frozen=True)
class Configuration:
    """A way for a backend to serve a call: `with configuration.forced(): serve(request, backend)`."""

    name: str
    _force: Callable[[], AbstractContextManager[None]] = field(
        default=contextlib.nullcontext, repr=False, compare=False
    )

    def forced(self) -> AbstractContextManager[None]:
        """Run calls in this configuration within the block.

        Raises (at the end):
            RuntimeError: no call within asked for what was to be forced.
        """
        return self._force()


def configurations(backend: str, request: MoECall) -> list[Configuration]:
    """The configurations that a backend of `FUSED_MOE` can choose for a call; "default" is first.

    FlashInfer's layers are asked by running the call once in their default configuration.
    """
    if backend.startswith("flashinfer:"):
        return every_tactic(lambda: FUSED_MOE.serve(request, backend))
    if backend == "triton":
        return _of_triton(request)
    return [Configuration(DEFAULT)]


def every_tactic(call: Callable[[], object]) -> list[Configuration]:
    """Return the configurations of a call of FlashInfer: one for each tactic. The call runs once."""
    return [Configuration(t.name, lambda t=t: forced(t)) for t in advertised(call)]  # type: ignore[misc]


def advertised(call: Callable[[], object]) -> list[Tactic]:
    """The tactics that FlashInfer can choose in a call, after the default. The call runs once.

    A call may ask more than once (cutlass asks for each GEMM). Each answer to one question is then
    combined with the defaults of the others.
    """
    questions: dict[str, list[list[Any]]] = {}

    def note(
        tuner: Any, custom_op: str, runners: list, tuning_config: Any, inputs: list, **_: Any
    ) -> tuple[Any, Any]:
        if custom_op not in questions:
            questions[custom_op] = [
                autotuner.valid_tactics(tuner, custom_op, runner, tuning_config, inputs)
                for runner in runners
            ]
        return runners[0], UNTUNED

    with autotuner.answered_by(note):
        call()
    result = [Tactic(DEFAULT)]
    for op, by_runner in questions.items():
        prefix = op.rsplit(":", 1)[-1] + " " if len(questions) > 1 else ""
        for place, values in enumerate(by_runner):
            runner = f"runner {place} " if len(by_runner) > 1 else ""
            result += [
                Tactic(f"{prefix}{runner}{json.dumps(value)}", op, place, value)
                for value in values
                if value != UNTUNED or place > 0
            ]
    return result


@contextlib.contextmanager
def forced(tactic: Tactic) -> Iterator[None]:
    """Let FlashInfer's layers run this tactic within the block.

    Raises (at the end):
        RuntimeError: nothing asked the tactic's question, so that it did not run.
    """
    asked = tactic.op is None

    def answer(
        tuner: Any, custom_op: str, runners: list, tuning_config: Any, inputs: list, **_: Any
    ) -> tuple[Any, Any]:
        nonlocal asked
        if custom_op != tactic.op:
            return runners[0], UNTUNED
        asked = True
        return runners[tactic.runner], tactic.value

    with autotuner.answered_by(answer):
        yield
    if not asked:
        raise RuntimeError(f"tactic {tactic.name} did not run: {tactic.op} never asked for one")


def _of_triton(request: MoECall) -> list[Configuration]:
    from ..kernels.moe import tile_table
    from ..kernels.moe.autotune import cache
    from ..kernels.moe.hopper.config import CONFIGS

    result = [Configuration(DEFAULT)]
    if request.batch_invariant:  # always the table's
        return result
    experts, top_k = request.experts, request.routed()[0].shape[1]
    slots = tile_table.local_slots(request.tokens * top_k, experts, request.all_experts)
    key = cache.key_of(experts, slots, top_k, request.mode)
    table = tile_table.table_configs(experts, slots)
    if tile_table.ring_serves(experts):
        return result + [
            Configuration(f"tiles of {ring.bn} tokens", _using(key, (ring, ring)))
            for ring in CONFIGS
            if (ring, ring) != table
        ]
    for which in (0, 1):
        for config in _tiles(key.weights[which][1], native=key.native):
            pair = [replace(other, bn=config.bn) for other in table]  # type: ignore[arg-type]
            pair[which] = config
            if tuple(pair) != table:
                name = f"gemm{which + 1} {_words(config)}"
                result.append(Configuration(name, _using(key, (pair[0], pair[1]))))
    return result


def _tiles(columns: int, *, native: bool) -> "list[GemmConfig]":
    """Every choice of the shipped table that the kernel can run.

    The candidates of `autotune_fused_moe` are compared with the table's when they are measured.
    """
    from ..kernels.moe import tile_table
    from ..kernels.moe.autotune import cache

    shipped = dict.fromkeys(
        tile_table.gemm_config(each, 1, width, native=native)
        for each in (1, 17, 65, 1024)
        for width in (128, 4096)
    )
    return [c for c in shipped if cache.refusal(c, columns, native=native) is None]


def _words(c: "GemmConfig") -> str:
    words = f"{c.bm}x{c.bn}x{c.bk} stages {c.stages} warps {c.warps}"
    words += "" if c.registers is None else f" registers {c.registers}"
    return words + (" decoded" if c.decoded else "")


def _using(key: Any, pair: "Configs") -> Callable[[], AbstractContextManager[None]]:
    from ..kernels.moe.autotune import cache

    @contextlib.contextmanager
    def force() -> Iterator[None]:
        looked_up = False
        lookup = cache.lookup

        def noting(asked: Any) -> Any:
            nonlocal looked_up
            looked_up |= asked == key
            return lookup(asked)

        with cache.using(key, pair), mock.patch.object(cache, "lookup", noting):
            yield
        if not looked_up:
            raise RuntimeError(f"configurations {pair} did not run: no call had the key {key}")

    return force
