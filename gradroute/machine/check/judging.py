"""What is wrong with one case, if anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ...testing import Result, assert_same_bits
from . import on_cuda
from .buffers import FINITE, NAN, Guards
from .cases import Case
from .far_rows import NotChecked, far_apart
from .trials import Expected, Refused, Trial, made

#: What can come of a case: it is right; it is wrong; it could not be checked; the backend refuses the call, as it may;
#: the check itself failed before it called the backend, which says nothing about the backend.
RIGHT, WRONG, UNCHECKED, REFUSED, UNMADE = "right", "wrong", "unchecked", "refused", "not made"

# The inputs of how many calls a graph replays.
REPLAYED = 3
# How often a call is made whose results must be the same, where the case does not say it.
RUNS = 3
# Backends without kernels of their own, which promise neither the same bits every time nor that calls can be captured.
COMPOSED = ("torch", "reference")


class _Unmade(Exception):
    """The check failed before it called the backend."""


class Outcome(NamedTuple):
    """What came of a case.

    Attributes:
        state: RIGHT, WRONG, UNCHECKED, REFUSED or UNMADE.
        text: what is wrong and by how much, or why it was not checked, is refused or was not made.
    """

    state: str
    text: str = ""


def judged(case: Case, backend: str, device: torch.device, seed: int) -> Outcome:
    """Runs a case on a backend, in this process; a kernel may fail in any way, and the outcome says so."""
    try:
        CHECKS[case.kind](case, backend, device, seed)
        synchronize(device)
    except Refused as refusal:
        return Outcome(REFUSED, str(refusal))
    except _Unmade as fault:
        return Outcome(UNMADE, str(fault))
    except NotChecked as reason:
        return Outcome(UNCHECKED, str(reason))
    except (torch.OutOfMemoryError, MemoryError) as error:
        return Outcome(UNCHECKED, f"out of memory: {_first_line(error)}")
    except AssertionError as error:
        return Outcome(WRONG, str(error))
    except Exception as error:  # a kernel may fail in any way
        return Outcome(WRONG, f"{type(error).__name__}: {_first_line(error)}")
    return Outcome(RIGHT)


def survives(device: torch.device) -> bool:
    """Whether this process can go on with a device: after some errors of CUDA it cannot."""
    try:
        synchronize(device)
    except RuntimeError:
        return False
    return True


def synchronize(device: torch.device) -> None:
    """Waits for the device, so that its errors are those of this case."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


def _numbers(case: Case, backend: str, device: torch.device, seed: int) -> None:
    trial = _made(case, backend, device, seed)
    _expected(trial).check(_run(trial), case.op)


def _made(case: Case, backend: str, device: torch.device, seed: int) -> Trial:
    with _before_the_backend("the call"):
        return made(case, backend, device, seed)


def _expected(trial: Trial) -> Expected:
    with _before_the_backend("what the result has to be"):
        return trial.expected()


@contextmanager
def _before_the_backend(what: str) -> Iterator[None]:
    """Within it an error is a fault of the check, unless it says that the backend refuses or that memory is short."""
    try:
        yield
    except (Refused, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {_first_line(error)}"
        raise _Unmade(f"the check could not make {what}: {said}") from error


def _run(trial: Trial) -> Result:
    return trial.prepared(lambda _, tensor: tensor)()


def _determinism(case: Case, backend: str, device: torch.device, seed: int) -> None:
    trial = _made(case, backend, device, seed)
    around_vendors = case.op == "routed_attention" and backend != "triton"
    # Own kernels are deterministic always; torch's and vendors' only where that is demanded.
    with _deterministic() if backend in COMPOSED or around_vendors else nullcontext():
        first = _run(trial)
        for number in range(1, case.options.get("runs", RUNS)):
            assert_same_bits(_run(trial), first, f"run {number + 1}")


@contextmanager
def _deterministic() -> Iterator[None]:
    was, warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)


def _bounds(case: Case, backend: str, device: torch.device, seed: int) -> None:
    trial = _made(case, backend, device, seed)
    expected = _expected(trial)
    for bits, shift, said in ((NAN, 0, "guards of NaN"), (FINITE, 1, "guards of numbers")):
        guards = Guards(bits, shift, trial.changing)
        run = trial.prepared(guards.hold)
        with guards.allocating():
            result = run()
        synchronize(device)
        guards.check()
        expected.check(result, f"{case.op} between {said}")


def _strides(case: Case, backend: str, device: torch.device, seed: int) -> None:
    trial, moved = _made(case, backend, device, seed), case.options["far"]

    def place(name: str, tensor: Tensor) -> Tensor:
        return far_apart(tensor) if name == moved else tensor

    _expected(trial).check(trial.prepared(place)(), f"{case.op} with rows of {moved} far apart")


def _graphs(case: Case, backend: str, device: torch.device, seed: int) -> None:
    def captured(step: Callable[[], Result], device: torch.device) -> tuple[Result, Callable[[], None]]:
        try:
            return on_cuda.captured(step, device)
        except RuntimeError as error:
            if backend not in COMPOSED:
                raise
            raise NotChecked(f"it cannot be captured: {_first_line(error)}") from None

    on_cuda.check_graph([_made(case, backend, device, seed + i) for i in range(REPLAYED)], device, captured)


def _streams(case: Case, backend: str, device: torch.device, seed: int) -> None:
    on_cuda.check_stream(_made(case, backend, device, seed), device)


CHECKS = {
    "numbers": _numbers,
    "determinism": _determinism,
    "bounds": _bounds,
    "strides": _strides,
    "graphs": _graphs,
    "streams": _streams,
}
