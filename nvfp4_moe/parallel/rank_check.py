"""Compares the arguments of all ranks of a call, before any data is exchanged.

Each rank says in a header what it was called with, or why it cannot take part: a rank with bad input
takes part in this exchange too, so that the others learn of it. The sizes of the headers are sent first.
All ranks compare the same headers, so all of them raise, or none.
"""

# SPDX-License-Identifier: Apache-2.0
import json
import operator
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

from ..kernels.moe.backends import FUSED_MOE
from ..kernels.moe.call import MoECall
from ..reference import checks
from ..reference.fingerprint import fingerprint
from ..reference.numerics.functions import checksum

REASON = 1000
"""The number of characters of an error that is sent to the other ranks."""
Fields = dict[str, object]
Group = dist.ProcessGroup | None
_T = TypeVar("_T")


class AgreementError(ValueError):
    """The arguments of the ranks do not fit together, or one cannot serve; it is raised on each."""


def prepare(
    call: str,
    make: Callable[[], tuple[_T, Fields]],
    group: Group,
    *,
    check: bool,
    may_differ: Collection[str] = (),
) -> tuple[_T, list[Fields] | None]:
    """Return this rank's part of a call, after all ranks agreed that theirs fit it.

    Args:
        call: what is called, which the ranks must agree on, too.
        make: checks this rank's arguments; (what it needs of them, what the others must know).
        check: False: nothing is sent; errors of this rank are raised here alone.
        may_differ: fields that every rank has its own value of.

    Returns:
        (what `make` made, the fields of every rank; None without `check`).

    Raises:
        AgreementError: on every rank, if one could not make its part, or fields differ.
        TypeError: on this rank alone, which cannot reach the others without a group.
    """
    if group is not None:
        checks.instance("group", group, dist.ProcessGroup, "a process group of this rank, or None")
    if not check:
        return make()[0], None
    try:
        made, fields = make()
        header = _encoded({"call": call, **fields})
    except Exception as error:  # whatever it is, the others wait for this rank's header
        header = _encoded({"call": call, "error": _reason(error)})
        _compare(_exchange(header, group), ())
        raise
    every = _exchange(header, group)
    _compare(every, may_differ)
    return made, every


def described(r: MoECall, backend: str) -> Fields:
    """Return the facts of a call that must be equal on every rank."""
    e = r.experts
    return {
        "backend": FUSED_MOE.resolve(r, backend),
        "num_experts": r.num_experts,
        "top_k": r.routing.top_k,
        "hidden_size": e.hidden_size,
        "intermediate_size": e.intermediate_size,
        "activation_type": e.activation.name,
        "router_weight_on_input": e.router_weight_on_input,
        "activation": r.quantize or "bf16",
        "input_scale": e.input_scale.item() if r.is_static and e.input_scale is not None else None,
        "routing": str(r.routing) if r.logits is not None else "ids and weights",
        "contract": fingerprint(),
        "functions": checksum(r.routing.functions) if r.logits is not None else "none",
        "routing weights": _dtype(r.weights) if r.logits is None else "from logits",
        "recipe": str(r.recipe),
        "build": r.build,
        "finalize_order": r.finalize_order,
        "batch_invariant": r.batch_invariant,
        "output_dtype": str(r.output_dtype),
    }


def _dtype(t: torch.Tensor | None) -> str:
    return "none" if t is None else str(t.dtype)


def _reason(error: Exception) -> str:
    """Shorten the error for the other ranks."""
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= REASON else text[: REASON - 4] + " ..."


def _encoded(header: Mapping[str, object]) -> bytes:
    """Encode a header in ASCII, whatever characters it has."""
    return json.dumps(header, default=operator.index).encode("ascii")


def _exchange(mine: bytes, group: Group) -> list[Fields]:
    """Return the headers of all ranks, by rank."""
    device, ranks = _device(group), dist.get_world_size(group)
    size = torch.tensor([len(mine)], dtype=torch.int64, device=device)
    sizes = [torch.empty_like(size) for _ in range(ranks)]
    dist.all_gather(sizes, size, group=group)
    lengths = torch.cat(sizes).tolist()
    header = torch.frombuffer(bytearray(mine.ljust(max(lengths))), dtype=torch.uint8).to(device)
    every = [torch.empty_like(header) for _ in range(ranks)]
    dist.all_gather(every, header, group=group)
    return [json.loads(bytes(t.tolist())) for t in every]


def _device(group: Group) -> torch.device:
    """Return the device on which the group moves headers: the CPU if it can."""
    if "gloo" in str(dist.get_backend_config(group)):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _compare(every: list[Fields], may_differ: Collection[str]) -> None:
    errors = [f"rank {rank}: {f['error']}" for rank, f in enumerate(every) if "error" in f]
    if errors:
        raise AgreementError(f"not every rank can take part; {'; '.join(errors)}")
    names = dict.fromkeys(name for fields in every for name in fields if name not in may_differ)
    if len({str(fields["call"]) for fields in every}) > 1:
        names = {"call": None}  # of other calls nothing else need be alike
    wrong = [
        text
        for name in names
        if (text := _difference(name, [f.get(name) for f in every])) is not None
    ]
    if wrong:
        raise AgreementError(f"the ranks' calls differ: {'; '.join(wrong)}")


def _difference(name: str, values: list[object]) -> str | None:
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(str(value), []).append(rank)
    if len(ranks) == 1:
        return None
    told = (f"{value} on {', '.join(map(str, where))}" for value, where in ranks.items())
    return f"{name} is {', '.join(told)}"
