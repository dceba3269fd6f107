"""Processes that check, one backend's cases at a time: a kernel may end its process, or never come back.

A process gets one case after another, so that it is known which one ended it. Another process goes on with the rest.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import warnings
from collections import deque
from collections.abc import Generator, Sequence
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

import torch

from .cases import Case
from .judging import RIGHT, UNCHECKED, WRONG, Outcome, judged, survives

# What a cluster sends to a job that is over its time, and a terminal that closes.
ENDING = (signal.SIGTERM, signal.SIGHUP)
# A process imports torch and starts CUDA before its first case.
START_SECONDS = 300.0
# After so many lost processes the rest of the cases stays unchecked.
MOST_LOST = 5
# The system takes no wait of any length; what has a later deadline, or none, is waited for again.
LONGEST_WAIT = 86400.0


class Plan(NamedTuple):
    """How the cases of a backend are run.

    Attributes:
        backend: a name of `around_vendors.CHECKED`.
        device: where.
        seed: of all numbers.
        processes: how many at once.
        limit: the seconds after which a case counts as one that hangs.
    """

    backend: str
    device: torch.device
    seed: int
    processes: int
    limit: float


class LostProcesses(Exception):
    """So many processes ended that the rest of the cases was not checked; or one never began."""


def outcomes(cases: Sequence[Case], plan: Plan) -> Generator[tuple[Case, Outcome], None, None]:
    """Every case with what came of it, as they end.

    Raises:
        LostProcesses: the cases that were not yielded are unchecked.
    """
    waiting = deque(cases)
    workers = [_Worker(plan) for _ in range(min(plan.processes, len(waiting)))]
    lost = 0
    try:
        while workers:
            for worker in _heard(workers):
                case, said = worker.case, worker.hear()
                if case is not None:
                    yield case, worker.ending if said is None else said.outcome
                if said is not None and said.goes_on and waiting:
                    worker.give(waiting.popleft())
                    continue
                worker.end()
                workers.remove(worker)
                if said is None:
                    lost += 1
                    _check_lost(worker, case, lost, waiting)
                if waiting:
                    workers.append(_Worker(plan))
    finally:
        for worker in workers:
            worker.end()


def _check_lost(worker: _Worker, case: Case | None, lost: int, waiting: Sequence[Case]) -> None:
    """Raises LostProcesses where another process would be lost too."""
    if case is None:
        raise LostProcesses(
            f"a process did not begin: {worker.ending.text} (a program that runs the check itself has to be a file, "
            "and to do so under `if __name__ == '__main__':`, because each process imports it)"
        )
    if lost == MOST_LOST and waiting:
        raise LostProcesses(f"{lost} processes were lost")


def _heard(workers: list[_Worker]) -> list[_Worker]:
    """The processes that have said something, have ended, or are over their time."""
    soonest = min(worker.deadline for worker in workers)
    seconds = max(0.0, min(LONGEST_WAIT, soonest - time.monotonic()))
    said = wait([worker.connection for worker in workers], timeout=seconds)
    now = time.monotonic()
    return [worker for worker in workers if worker.connection in said or worker.deadline <= now]


class _Said(NamedTuple):
    """What a process says when it has begun, and after every case.

    Attributes:
        outcome: of its case; nobody reads the one with which it begins.
        goes_on: whether it can be given another; not where its device has failed.
    """

    outcome: Outcome
    goes_on: bool


class _Worker:
    """A process that checks, as the command sees it.

    Attributes:
        case: the one that it is at; None: it has not begun.
        deadline: when it counts as hanging, by time.monotonic().
        ending: what its end says about its case.
    """

    def __init__(self, plan: Plan) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.limit = plan.limit
        self.case: Case | None = None
        self.ending = Outcome(RIGHT)
        threads = max(1, torch.get_num_threads() // plan.processes)
        self.process = context.Process(target=_serve, args=(theirs, plan, threads), daemon=True)
        # The process inherits what is blocked: these are for the command, which ends its processes.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *ENDING})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
        self._wait_for(START_SECONDS)

    def _wait_for(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self._seconds = seconds

    def give(self, case: Case) -> None:
        """Has it check a case."""
        self.case = case
        self._wait_for(self.limit)
        with contextlib.suppress(OSError):  # it has ended, which shows when it is heard next
            self.connection.send(case)

    def hear(self) -> _Said | None:
        """What it says; None where it has ended, or is ended now because it is over its time."""
        if not self.connection.poll():
            self.end()
            self.ending = Outcome(WRONG, f"the process did not come back within {self._seconds:g} seconds")
            return None
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            self.ending = _ending(self.process.exitcode)
            return None

    def end(self) -> None:
        """Ends it, whatever it is at."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def _ending(code: int | None) -> Outcome:
    """What a process's exit code says about its case: nothing where another one killed it, as for want of memory."""
    if code is None or code >= 0:
        return Outcome(WRONG, f"the process ended with exit code {code}")
    known = {one.value: one.name for one in signal.Signals}
    text = f"the process died with signal {-code} ({known.get(-code, 'unknown')})"
    return Outcome(UNCHECKED if -code == signal.SIGKILL else WRONG, text)


def _serve(connection: Connection, plan: Plan, threads: int) -> None:
    """The process: says that it has begun, then checks what it is given."""
    warnings.simplefilter("ignore")  # results say what calls warn of
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms of CUDA need it
    if plan.device.type == "cuda":
        torch.cuda.set_device(plan.device)  # graphs are captured on the current device
    connection.send(_Said(Outcome(""), True))
    while True:
        try:
            case = connection.recv()
        except EOFError:
            return
        # Threads that wait for each other take 20 times as long where another process has their cores.
        torch.set_num_threads(threads if case.is_large else 1)
        outcome = judged(case, plan.backend, plan.device, plan.seed)
        goes_on = survives(plan.device)
        connection.send(_Said(outcome, goes_on))
        if not goes_on:
            os._exit(0)  # what tears a broken device down may never end
