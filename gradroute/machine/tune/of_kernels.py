"""Questions about the launch configurations of Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from ... import backends
from ...testing import Sample
from .. import answers
from .measuring import Effort, Judged, Measuring, Trial, ranking
from .question import Outcome, Question
from .workloads import call_of, kinds_of_calls, largest

BACKEND = "triton"


class Launch(Question):
    """The configuration by which a kernel is launched."""

    decides = "the sizes of blocks, warps and stages by which a Triton kernel is launched"

    def __init__(
        self,
        entry: str,
        op: str,
        options: dict[str, Any],
        dtype: torch.dtype,
        configs: list[dict[str, int]],
    ) -> None:
        super().__init__("launch", entry, shipped=configs[0])
        self.op = op
        self.options = options
        self.dtype = dtype
        self.configs = configs

    def measure(self, measuring: Measuring) -> Outcome:
        """Forward and backward of an op that launches the kernel."""
        size = largest(measuring.device, measuring.effort)
        by_name = {_text(config): config for config in self.configs}
        candidates: dict[str, list[Trial]] = {name: [] for name in by_name}
        for seed in range(measuring.effort.sets):
            call = call_of(self.op, size, self.dtype, measuring.device, seed, **self.options)
            judged = Judged(call)
            for name, config in by_name.items():
                candidates[name].append(
                    Trial(
                        partial(judged.call.run, BACKEND),
                        partial(judged.check, BACKEND),
                        {self.name: config},
                    )
                )
        contest = measuring.contest(candidates)
        outcome = Outcome(by_name[ranking(contest.milliseconds)[0]])
        outcome.add(contest)
        return outcome


def _text(config: dict[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())


def short_list(entry: str, device: torch.device) -> list[dict[str, int]]:
    """The configurations of an entry that are worth a try on a device, the shipped one first."""
    from ...kernels import launch  # imports Triton, which is there where its kernels are asked about
    from ...kernels.candidates import candidates

    return list(candidates(entry, launch.architecture_of(device)))


def asked_by(call: Sample, device: torch.device) -> list[str]:
    """The entries of kernels/configs.py that a forward and a backward of a call look up.

    Where one of its kernels fails, that is said when its question is asked, and those behind it are not found.
    """
    with answers.trying(device, {}) as questions, suppress(Exception):
        call.run(BACKEND)
    return [question.removeprefix("launch/") for question in questions if question.startswith("launch/")]


def questions(device: torch.device, dtype: torch.dtype, effort: Effort) -> Iterator[Question]:
    """Those about the kernels that ops launch with tensors of a dtype, each asked of the first call that does."""
    seen: set[str] = set()
    for op in backends.OPS:
        if BACKEND not in backends.candidates(op, torch.empty(0, dtype=dtype, device=device)):
            continue
        for options in kinds_of_calls(op):
            call = call_of(op, largest(device, effort), dtype, device, 0, **options)
            for entry in asked_by(call, device):
                configs = short_list(entry, device)
                if entry not in seen and len(configs) > 1:
                    yield Launch(entry, op, options, dtype, configs)
                seen.add(entry)
