"""A call in every configuration that a backend can choose, made again, its errors kept."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ..report.data import Failure
from .tactics import DEFAULT, Configuration

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Output:
    """Of a call, and of the same call made again: bits, or the error."""

    got: torch.Tensor | Exception
    again: torch.Tensor | Exception | None = None


@dataclass(frozen=True)
class RunOptions:
    """What is run of each case besides one call in the configuration that the backend chooses."""

    every_configuration: bool = False
    replay: bool = False
    """Every call once more, on a GPU in a CUDA graph over poisoned memory: the same bits."""


ONCE = RunOptions()


def outputs(
    call: Call,
    configurations: Callable[[], Iterable[Configuration]],
    options: RunOptions,
    on_gpu: bool,
) -> dict[str, Output]:
    """What each configuration gave, by name.

    Args:
        configurations: called where the options ask for every configuration.
    """
    every: Iterable[Configuration] = [Configuration(DEFAULT)]
    if options.every_configuration:
        try:
            every = configurations()
        except Exception as error:  # FlashInfer runs the call to be asked
            return {DEFAULT: Output(error)}
    again = _replayed if on_gpu else _caught
    return {
        c.name: Output(_caught(call, c), again(call, c) if options.replay else None) for c in every
    }


def _caught(call: Call, configuration: Configuration) -> torch.Tensor | Exception:
    try:
        with configuration.forced():
            return call()
    except Exception as error:
        return error


def _replayed(call: Call, configuration: Configuration) -> torch.Tensor | Exception:
    """The output of a call that was captured in a CUDA graph, its memory full of NaN before."""

    def replay() -> torch.Tensor:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call()
        output.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        return output.clone()

    return _caught(replay, configuration)


def crash(title: str, error: Exception) -> Failure:
    first, *rest = f"{type(error).__name__}: {error}".splitlines()
    return Failure(title, first, rest)
