"""What `python -m gradroute check` found: which backends the automatic choice leaves out on this machine."""

from __future__ import annotations

import logging
import multiprocessing
import os
import warnings
from typing import Any, NamedTuple

import torch

from ..tracing import constant_when_traced
from . import identity
from .records import CHECK, DAMAGED, Record, warn_ignored

LOG = logging.getLogger("gradroute")


class Verdict(NamedTuple):
    """What a check found about a backend on a device, or about FlashAttention-4's backward, by the name "fa4".

    Attributes:
        passed: whether it was right.
        date: when, in ISO 8601.
        failures: what was wrong, a line each; none where it passed.
        unchecked: what could not be checked here, a line each.
    """

    passed: bool
    date: str
    failures: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()

    @classmethod
    def of(cls, found: Any) -> Verdict:
        """Reads a verdict from a file of findings; raises ValueError where it is none."""
        lines = tuple(found["failures"]), tuple(found.get("unchecked", ()))
        verdict = cls(found["passed"], found["date"], *lines)
        if not all(isinstance(text, str) for text in (verdict.date, *lines[0], *lines[1])):
            raise TypeError("date, failures, unchecked: expected texts")
        if type(verdict.passed) is not bool or verdict.passed != (not verdict.failures):
            raise ValueError(f"passed: got {verdict.passed!r} with {len(verdict.failures)} failures")
        return verdict


def of(device: torch.device) -> dict[str, Verdict]:
    """The verdicts on a device by backend; none where nothing was checked. Read once, with a warning of failures."""
    found = _found.get(device)
    if found is None:
        found = _read(device)
        _tell(device, found)  # where warnings are errors it raises, at the next call again
        _found[device] = found
    return found


@constant_when_traced
def why_not(backend: str, device: torch.device) -> str | None:
    """Why the automatic choice leaves a backend out on a device; None where no check has found it wrong."""
    verdict = of(device).get(backend)
    return None if verdict is None or verdict.passed else _why(backend, device, verdict)


def _why(backend: str, device: torch.device, verdict: Verdict) -> str:
    return (
        f"`python -m gradroute check` found it wrong on this machine on {verdict.date[:10]} "
        f"({verdict.failures[0]}), and it stays out of the automatic choice until a check passes: "
        f"`python -m gradroute check --device {device} --backend {backend}`"
    )


def forget() -> None:
    """Has the files read again at the next call."""
    _found.clear()


_found: dict[torch.device, dict[str, Verdict]] = {}
_is_told = False

# What launchers (torchrun, Slurm, Open MPI) call a process's number on its machine.
_LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")


def _read(device: torch.device) -> dict[str, Verdict]:
    if not identity.keeps_findings(device):
        return {}
    record = Record(CHECK, device)
    found = {}
    for backend, written in record.read().items():
        try:
            found[backend] = Verdict.of(written)
        except DAMAGED as error:
            warn_ignored(record.file, error, f"backend {backend!r}")
    return found


def _tell(device: torch.device, found: dict[str, Verdict]) -> None:
    """Warns of the backends that are left out, and says once that a CUDA device was never checked."""
    left_out = [
        f"backend {backend!r} on {device}: {_why(backend, device, verdict)}"
        for backend, verdict in found.items()
        if not verdict.passed
    ]
    if left_out:
        warnings.warn("; ".join(left_out), RuntimeWarning, stacklevel=2)
    if device.type == "cuda" and identity.keeps_findings(device) and not found:
        _tell_unchecked(device)


def _tell_unchecked(device: torch.device) -> None:
    """One line a program: of its main process, and where there are ranks of the first one on a machine alone."""
    global _is_told
    rank = _rank_here()
    is_first = rank == 0 if rank is not None else multiprocessing.parent_process() is None
    if _is_told or not is_first or torch.utils.data.get_worker_info() is not None:
        return
    _is_told = True
    LOG.warning(
        "gradroute was never checked on this %s: `python -m gradroute check` does it in minutes, and `python -m "
        "gradroute tune` measures what is fastest here",
        identity.name_of(device),
    )


def _rank_here() -> int | None:
    """This process's number on its machine; without a launcher that in its process group; None: it has none."""
    for name in _LOCAL_RANKS:
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else None
