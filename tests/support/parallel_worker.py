"""One rank: `parallel_worker.py SCENARIO TRANSPORT RANKS RANK FOLDER`, started by `test_parallel.py`.

It writes what it saw to FOLDER/RANK.json. The scenario is "cases", one of them, or how rank 1 is lost.
"""

# SPDX-License-Identifier: Apache-2.0
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import moe_cases
import parallel_agreement_cases  # noqa: F401  more of CASES
import session
import torch
import torch.distributed as dist
from parallel_cases import CASES, SHAPE, Rank

TIMEOUT = 5.0
"""Seconds that a lost rank's group waits."""


def main() -> None:
    scenario, transport, ranks, rank, folder = sys.argv[1:]
    torch.set_num_threads(1)
    device = torch.device("cpu" if transport == "gloo" else f"cuda:{rank}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        transport,
        init_method=(Path(folder) / "store").as_uri(),
        rank=int(rank),
        world_size=int(ranks),
        timeout=timedelta(seconds=120),
    )
    seconds = TIMEOUT if scenario in LOSSES else 60
    group = dist.new_group(timeout=timedelta(seconds=seconds))
    if session.interpreting():
        import quick_interpreter

        quick_interpreter.install()
    triton = device.type == "cuda" or session.interpreting()
    me = Rank(int(rank), int(ranks), group, device, "triton" if triton else "reference")
    if scenario in LOSSES:  # what is slow the first time, before the clock of the group runs
        me.one_process(moe_cases.make(SHAPE))
        dist.barrier()
    names = list(CASES) if scenario == "cases" else [scenario]
    found = LOSSES[scenario](me) if scenario in LOSSES else cases(me, names)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    if scenario not in LOSSES:
        dist.destroy_process_group()
    else:
        os._exit(0)  # the group is broken


def cases(me: Rank, names: list[str]) -> list[str]:
    """The cases that were well; one that is not ends this process, and so the others."""
    for name in names:
        print("case", name, flush=True)
        CASES[name](me)
    return names


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raised(me: Rank, call: Callable[[], object]) -> dict[str, object]:
    """The exception of a call, and after how many seconds."""
    start = time.monotonic()
    try:
        call()
        if me.device.type == "cuda":
            torch.cuda.synchronize()  # NCCL's calls return at once, and fail where they are awaited
    except Exception as error:
        name = type(error).__name__
        return {"raised": name, "text": str(error), "seconds": time.monotonic() - start}
    return {"raised": None}


def killed_before(me: Rank) -> dict[str, object]:
    layer = moe_cases.make(SHAPE)
    me.tp(layer)  # connections exist
    if me.rank == 1:
        die()
    return raised(me, lambda: me.ep(layer, "all-to-all"))


def killed_after_the_headers(me: Rank) -> dict[str, object]:
    layer = moe_cases.make(SHAPE)
    me.ep(layer, "all-to-all")
    if me.rank == 1:
        dist.all_to_all_single = lambda *_, **__: die()  # type: ignore[assignment]
    return raised(me, lambda: me.ep(layer, "all-to-all"))


def killed_in_the_sum(me: Rank) -> dict[str, object]:
    layer = moe_cases.make(SHAPE)
    me.tp(layer)
    if me.rank == 1:
        dist.all_reduce = lambda *_, **__: die()  # type: ignore[assignment]
    return raised(me, lambda: me.tp(layer))


def late(me: Rank) -> dict[str, object]:
    """Rank 1 hangs for longer than the group waits, and finds the others gone."""
    layer = moe_cases.make(SHAPE)
    me.tp(layer)
    if me.rank == 1:
        time.sleep(TIMEOUT + 4)
    return raised(me, lambda: me.tp(layer))


LOSSES = {f.__name__: f for f in (killed_before, killed_after_the_headers, killed_in_the_sum, late)}

if __name__ == "__main__":
    main()
