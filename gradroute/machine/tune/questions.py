"""All questions about a device, in the order of their worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .. import answers
from . import of_attention, of_backends, of_kernels, of_products
from .measuring import Effort
from .question import Question
from .workloads import dtypes_of


def questions(device: torch.device, effort: Effort, only: Sequence[str] = ()) -> list[Question]:
    """The questions of a run: those of the most used dtype first.

    Args:
        device: the CPU or a CUDA device.
        effort: how much is measured.
        only: names of questions, or how they begin, such as a kind; none: all.
    """
    found: dict[str, Question] = {}
    for dtype in dtypes_of(device, effort):
        for kind in answers.KINDS:
            if not only or any(name.split("/")[0] == kind for name in only):
                for question in _of_kind(kind, device, dtype, effort):
                    found.setdefault(question.name, question)
    return [question for question in found.values() if not only or is_named(question.name, only)]


def is_named(question: str, names: Sequence[str]) -> bool:
    """Whether a question is one of those named, or begins as one of them does."""
    return any(question == name or question.startswith(f"{name}/") for name in names)


def _of_kind(kind: str, device: torch.device, dtype: torch.dtype, effort: Effort) -> Iterator[Question]:
    if kind == "backends":
        return of_backends.questions(device, dtype, effort)
    if kind == "launch":
        return of_kernels.questions(device, dtype, effort)
    make = {
        "vendors": of_attention.vendors,
        "skip_below": of_attention.skip_below,
        "rectangles": of_products.rectangles,
        "grouped": of_products.grouped,
        "run": of_products.runs,
        "tiles": of_attention.tiles,
    }[kind]
    return make(device, dtype)
