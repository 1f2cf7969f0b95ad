"""The engine behind every operation: which backend serves a call, and why the others do not.

An operation, as the quantizer or the fused mixture of experts, is a table of backends. Each backend
has a name, a refusal and a function that runs a call. `Operation` chooses one, explains the choice, logs
a fallback once and runs the call. A user's backend is one more row of a table (`register_backend`).
"""

# SPDX-License-Identifier: Apache-2.0
import functools
import importlib.util
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, overload

import torch

from ..reference import checks
from .device import check_capability
from .records import recorder, repeats

HAS_TRITON = importlib.util.find_spec("triton") is not None
AUTO = "auto"
log = logging.getLogger("nvfp4_moe")


class UnsupportedError(ValueError):
    """The backend that was named, or every one, cannot serve the call; the message has the reason."""


class Call(Protocol):
    """The checked arguments of a call, a frozen dataclass."""

    @property
    def capability(self) -> tuple[int, int] | None:
        """The compute capability of the GPU that the call is for; None on the CPU."""


C = TypeVar("C", bound=Call)
R = TypeVar("R")
T = TypeVar("T")
P = ParamSpec("P")
Asked = tuple[C, str]
"""A call, and the full name of the backend that is asked for, or "auto"."""


def always(call: Any) -> bool:
    return True


def never(call: Any) -> bool:
    return False


def serves_all(call: Any) -> str | None:
    """The refusal of a backend that serves every call."""
    return None


def on_gpu(call: Call) -> bool:
    """Return True for a call on a GPU: "auto" never picks Triton's interpreter."""
    return call.capability is not None


@dataclass(frozen=True)
class Backend(Generic[C, R]):
    """One row of an operation's table."""

    name: str
    refusal: Callable[[C], str | None]
    """Returns why the backend cannot serve a call; None if it can. Nothing is computed."""
    run: Callable[[C], R]
    """Runs a call that `refusal` let pass. NotImplementedError: it finds only now that it cannot."""
    automatic: Callable[[C], bool] = always
    """Returns True if "auto" may take the backend for a call."""
    launches: bool = False
    """True if `run` does nothing on the GPU but launch kernels by `launcher.launch`, for `records`."""
    remembers: Callable[[C, RuntimeError], bool] | None = None
    """Returns True if this error of `run` means that no kernel was built for the call. `refusal` then
    refuses such calls from now on, and "auto" goes on to the next backend."""


@dataclass(frozen=True)
class Explanation:
    """The backend that a call would run on, and the reasons; printing it gives a table."""

    backend: str | None  # that would run; None if the call is invalid or no backend can serve
    reasons: tuple[tuple[str, str | None], ...]  # for every backend, None where it can serve
    notes: tuple[str, ...] = ()

    def reason(self, backend: str) -> str | None:
        """Why this backend cannot serve; None if it can."""
        return dict(self.reasons)[backend]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.reasons)
        lines = [f"would run: {self.backend or 'nothing'}"]
        lines += [
            f"  {name:<{width}}  {'can serve' if reason is None else 'no: ' + reason}"
            for name, reason in self.reasons
        ]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


OPERATIONS: dict[str, "Operation[Any, Any]"] = {}
"""The operations that `register_backend` knows, by name."""


class Operation(Generic[C, R]):
    """A table of backends, in the order in which "auto" tries them.

    Args:
        name: the public function, as users name the operation.
        backends: the rows of the table.
        aliases: other names of backends.
        notes: returns what an explanation says beside the reasons.
        adopt: makes the `run` of the table from the function and the name of a user's backend: it
            prepares the call and checks the results.
        unfit: returns why no user's backend can serve a call; None if one can.
    """

    def __init__(
        self,
        name: str,
        backends: Sequence[Backend[C, R]],
        *,
        aliases: Mapping[str, str] | None = None,
        notes: Callable[[C], Sequence[str]] | None = None,
        adopt: Callable[[str, Callable[[C], Any]], Callable[[C], R]] | None = None,
        unfit: Callable[[C], str | None] | None = None,
    ) -> None:
        self.name = name
        self._table = {backend.name: backend for backend in backends}
        self._aliases = dict(aliases or {})
        self._notes = notes
        self._adopt = adopt
        self._unfit = unfit
        if adopt is not None:
            OPERATIONS[name] = self

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all backends, users' too, in the order of the table."""
        return tuple(self._table)

    @property
    def accepted(self) -> tuple[str, ...]:
        """Every name that `backend` may have."""
        return (AUTO, *self._table, *sorted(self._aliases))

    def check_name(self, backend: Any) -> str:
        """The full name of a backend, or "auto".

        Raises:
            TypeError, ValueError: no backend has this name.
        """
        if isinstance(backend, str):
            name = self._aliases.get(backend, backend)
            if name == AUTO or name in self._table or backend in self._aliases:
                return name
        checks.one_of("backend", backend, self.accepted)
        raise AssertionError("one_of has raised")

    def refusal(self, backend: str, call: C) -> str | None:
        """Why a backend of the table cannot serve the call; None if it can."""
        return self._table[backend].refusal(call)

    def choose(self, call: C) -> str | None:
        """The backend that "auto" takes; None if no backend can serve the call."""
        for backend in self._table.values():
            if not backend.automatic(call):
                continue
            reason = backend.refusal(call)
            if reason is None:
                return backend.name
            on_blackwell = call.capability is not None and call.capability >= (10, 0)
            if on_blackwell and not torch.compiler.is_compiling():
                log_fallback(self.name, backend.name, reason)
        return None

    def resolve(self, call: C, backend: str) -> str:
        """The backend that serves the call: the named one, or the one that "auto" takes.

        Raises:
            UnsupportedError: the named backend, or every one, cannot serve the call.
        """
        name = self.choose(call) if backend == AUTO else backend
        if name is None:
            reasons = "; ".join(f"{b}: {self.refusal(b, call)}" for b in self._table)
            raise UnsupportedError(f"no backend can serve this call: {reasons}")
        if backend != AUTO and (reason := self.refusal(name, call)) is not None:
            raise _cannot_serve(name, reason)
        return name

    def run(self, backend: str, call: C) -> R:
        """Run a call on a backend whose refusal let it pass.

        Raises:
            UnsupportedError: the backend found only now that it cannot serve the call.
        """
        row = self._table[backend]
        if not row.launches:
            recorder.refuse(f"backend {backend} runs")
        try:
            return row.run(call)
        except NotImplementedError as error:
            raise _cannot_serve(backend, error) from error

    def serve(self, call: C, backend: str) -> R:
        """Run a call on the named backend, or on the one that "auto" takes.

        Raises:
            UnsupportedError: as `resolve` and `run` say. A backend that was named never falls back.
        """
        name = self.resolve(call, backend)
        remembers = self._table[name].remembers
        if backend != AUTO or remembers is None:
            return self.run(name, call)
        try:
            return self.run(name, call)
        except RuntimeError as error:
            if not remembers(call, error):
                raise
            log.warning("%s: %s had no kernel, falling back: %s", self.name, name, error)
        return self.serve(call, backend)

    def explain(self, call: C, backend: str) -> Explanation:
        """Say which backend `serve` of the same arguments would run, and why each other would not."""
        reasons = tuple((name, self.refusal(name, call)) for name in self._table)
        name = self.choose(call) if backend == AUTO else backend
        chosen = None if name is None or dict(reasons)[name] is not None else name
        return Explanation(chosen, reasons, tuple(self._notes(call)) if self._notes else ())

    @overload
    def served(self) -> Callable[[Callable[P, Asked[C]]], Callable[P, R]]: ...

    @overload
    def served(
        self, finish: Callable[[C, R], T]
    ) -> Callable[[Callable[P, Asked[C]]], Callable[P, T]]: ...

    def served(self, finish: Callable[[C, R], Any] | None = None) -> Any:
        """Decorate a function that checks arguments: the public function, which also runs the call.

        The decorated function returns the call and the full name of the backend that is asked for.
        `prepared` gives it back.

        Args:
            finish: makes the public function's result from the call and the backend's result.
        """

        def decorate(prepare: Callable[P, Asked[C]]) -> Callable[P, Any]:
            def run(*args: P.args, **kwargs: P.kwargs) -> Any:
                call, backend = prepare(*args, **kwargs)
                result = self.serve(call, backend)
                return result if finish is None else finish(call, result)

            @functools.wraps(prepare)
            def function(*args: P.args, **kwargs: P.kwargs) -> Any:
                if torch.compiler.is_compiling():
                    return run(*args, **kwargs)
                return repeats.repeat(run, args, kwargs)

            signature = inspect.signature(prepare)
            function.__signature__ = signature.replace(  # type: ignore[attr-defined]
                return_annotation=inspect.Signature.empty
            )
            return function

        return decorate

    def explaining(self, function: Callable[..., Any]) -> Callable[..., Explanation]:
        """The function that explains a public function, by the same arguments.

        `capability=(9, 0)` asks about another GPU than the one that the tensors are on. An invalid call
        is explained, not raised.
        """
        prepare, signature = prepared(function), inspect.signature(function)

        def explain(*args: Any, capability: Any = None, **kwargs: Any) -> Explanation:
            bound = signature.bind(*args, **kwargs)
            try:
                check_capability(capability)
                call, backend = prepare(*bound.args, **bound.kwargs)
            except (TypeError, ValueError) as error:
                return Explanation(None, tuple((name, str(error)) for name in self._table))
            if capability is not None:
                call = replace(call, capability=capability)
            return self.explain(call, backend)

        asked = inspect.Parameter("capability", inspect.Parameter.KEYWORD_ONLY, default=None)
        explain.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*signature.parameters.values(), asked], return_annotation=Explanation
        )
        explain.__doc__ = (
            f"Which backend `{function.__name__}` of the same arguments would run, and why each other "
            "would not.\n\n"
            "Nothing is computed; meta tensors do. `capability=(9, 0)` asks about another GPU than the "
            "one that\nthe tensors are on. An invalid call is explained, not raised."
        )
        return explain

    def add(self, backend: Backend[C, Any], before: str | None) -> None:
        """Add a user's backend (`register_backend`)."""
        assert self._adopt is not None, "not in OPERATIONS"
        name = backend.name
        taken = (AUTO, "flashinfer...", *self._table, *self._aliases)
        if name in taken or name.startswith("flashinfer"):
            raise ValueError(f"name is {name!r}; it must not be taken: {', '.join(taken)}")
        if before is not None:
            checks.one_of("before", before, self._table)
        unfit, refusal = self._unfit or (lambda call: None), backend.refusal
        adopted: Backend[C, R] = replace(
            backend,
            refusal=lambda call: unfit(call) or refusal(call),
            run=self._adopt(name, backend.run),
        )
        place = len(self._table) if before is None else list(self._table).index(before)
        rows = list(self._table.items())
        self._table = dict([*rows[:place], (name, adopted), *rows[place:]])
        repeats.forget()

    def remove(self, name: str) -> None:
        """Remove a user's backend; nothing happens where there is none of the name."""
        self._table.pop(name, None)
        repeats.forget()


def prepared(function: Callable[..., Any]) -> Callable[..., Asked[Any]]:
    """The part of a public function that checks its arguments and runs nothing (`Operation.served`)."""
    prepare: Callable[..., Asked[Any]] = function.__wrapped__  # type: ignore[attr-defined]
    return prepare


class Registration:
    """A user's backend in its table, until `remove`, or the end of a `with` block."""

    def __init__(self, operation: Operation[Any, Any], name: str) -> None:
        self.operation, self.name = operation.name, name
        self.remove = functools.partial(operation.remove, name)

    def __enter__(self) -> "Registration":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def register_backend(
    operation: str,
    name: str,
    run: Callable[[Any], Any],
    *,
    refusal: Callable[[Any], str | None] | None = None,
    before: str | None = None,
) -> Registration:
    """Add a backend of your own to an operation: `backend=name` then runs it, and `explain` knows it.

    Args:
        operation: the public function: "nvfp4_quantize" (also `nvfp4_quantize_masked`), "mm_fp4",
            "fused_moe" (also FlashInfer's two functions, as `trtllm_fp4_block_scale_moe`),
            "fused_moe_masked", "fused_quantize" (the three that end in `_nvfp4_quantize`), or
            "baseline_moe" (the BF16, FP8 and MXFP8 layers of `diff`).
        name: not yet a name of the operation; it must not begin with "flashinfer".
        run: takes the checked call, a frozen dataclass: `kernels.quantize.call.QuantizeCall`,
            `kernels.dense.call.DenseCall`, `kernels.moe.call.MoECall`,
            `kernels.moe.masked.call.MaskedMoECall`, `kernels.fused_quantize.call.FusedQuantizeCall`,
            `kernels.baseline_moe.call.BaselineCall`. It returns what the public function returns, on the
            tensors' device: (codes, block scales[, per-token scales]), or one tensor. A call of a fused
            layer arrives with quantized hidden states; `call.routed()` of a `MoECall` gives its ids and
            weights. A result of another shape or dtype raises. NotImplementedError becomes
            UnsupportedError.
        refusal: returns why `run` cannot serve a call, in a few words; None if it can. Omitted, it
            serves every call, also of a `build`, a recipe or a device that it does not know.
        before: "auto" tries this backend before the named one; omitted, "auto" never takes it.

    Returns:
        A handle: `remove()` takes the backend out of the table again, as does the end of a `with`.

    Raises:
        TypeError, ValueError: an unknown operation, a name that is taken, or what is no function.
    """
    checks.one_of("operation", operation, OPERATIONS)
    if not isinstance(name, str) or not name:
        checks.wrong_type("name", name, "the name of a backend")
    checks.function("run", run, "a function of the call")
    checks.function("refusal", refusal, "a function of the call", optional=True)
    backend: Backend[Any, Any] = Backend(
        name, refusal or serves_all, run, never if before is None else always
    )
    table = OPERATIONS[operation]
    table.add(backend, before)
    return Registration(table, name)


def check_results(
    backend: str, results: Any, expected: Sequence[torch.Tensor], like: torch.Tensor
) -> None:
    """Check what a user's backend returned.

    Args:
        expected: tensors of the right shapes and dtypes.
        like: on whose device the results must be.

    Raises:
        TypeError, ValueError: the backend, what it returned and what it must return.
    """
    name = f"the result of backend {backend}"
    count = f"{len(expected)} tensors"
    checks.instance(name, results, (tuple, list), count)
    if len(results) != len(expected):
        checks.wrong_value(name, results, count)
    for i, (result, e) in enumerate(zip(results, expected, strict=True)):
        one = name if len(expected) == 1 else f"{name}, [{i}],"
        checks.tensor(one, result, (e.dtype,), e.shape, like=("its call", like))


def _cannot_serve(backend: str, reason: object) -> UnsupportedError:
    return UnsupportedError(f"backend {backend} cannot serve this call: {reason}")


@functools.lru_cache(maxsize=256)
def log_fallback(operation: str, backend: str, reason: str) -> None:
    """Log that "auto" passed a backend over; the same fallback is logged once in a process."""
    log.info("%s: %s cannot serve, falling back: %s", operation, backend, reason)


def triton_refusal_of(t: torch.Tensor, what: str, capability: tuple[int, int] | None) -> str | None:
    """Why Triton cannot run on the tensor (`what` it is, "a is") or on the GPU asked about."""
    if not HAS_TRITON:
        return "triton is not installed"
    from . import triton_target

    if capability is not None:
        if capability >= triton_target.MIN_CAPABILITY:
            return None
        return f"sm_{capability[0]}{capability[1]} is before sm_80"
    if t.device.type == "cpu" and triton_target.INTERPRETING:
        return None
    return (
        f"{what} on the {t.device.type}; Triton runs on a GPU, or on the CPU in its interpreter "
        "(TRITON_INTERPRET=1 set before the first import)"
    )
