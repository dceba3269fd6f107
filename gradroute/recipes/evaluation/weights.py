"""Where two checkpoints differ in their parameters: the relative change of every layer's modules."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from ...arguments import check_is

#: A module of a list of layers: what comes before, the layer's number, and the rest of the name.
_LAYER = re.compile(r"^(?P<list>.*?\.(?:layers|h|blocks|block))\.(?P<number>\d+)\.(?P<rest>.+)$")


def weight_differences(before: nn.Module, after: nn.Module) -> dict[str, Any]:
    """The relative change of the parameters: ‖after − before‖ / ‖before‖, Frobenius norms over each entry's.

    Args:
        before: a model.
        after: another of its architecture. A parameter whose shape differs, of an expanded model for example, is
            compared in the part that both have from the first row and column on; what else there is counts as changed.

    Returns:
        {"layers": [number], "modules": [name], "change": [[ratio or None]] by module and layer, "outside":
        {name: ratio} of what lies outside of the layers, "reshaped": names of parameters whose shapes differ,
        "missing": names that one of the two lacks}.
    """
    check_is("before", before, nn.Module, "a torch.nn.Module")
    check_is("after", after, nn.Module, "a torch.nn.Module")
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    squares: dict[tuple[str, int | None], list[float]] = {}
    reshaped = []
    for name in old.keys() & new.keys():
        if old[name].shape != new[name].shape:
            reshaped.append(name)
        change, size = _squares(old[name], new[name])
        total = squares.setdefault(_place(name), [0.0, 0.0])
        total[0] += change
        total[1] += size
    ratios = {place: _ratio(*sums) for place, sums in squares.items()}
    layers = sorted({number for _, number in ratios if number is not None})
    order = list(dict.fromkeys(_place(name)[0] for name in old))
    modules = [name for name in order if any((name, number) in ratios for number in layers)]
    return {
        "layers": layers,
        "modules": modules,
        "change": [[ratios.get((name, number)) for number in layers] for name in modules],
        "outside": {name: ratios[name, None] for name in order if (name, None) in ratios},
        "reshaped": sorted(reshaped),
        "missing": sorted(old.keys() ^ new.keys()),
    }


def _place(name: str) -> tuple[str, int | None]:
    """The module of a parameter within its layer, without "weight" or "bias", and the layer's number."""
    module = name.rpartition(".")[0] or name
    match = _LAYER.match(name)
    if match is None:
        return module, None
    return match["rest"].rpartition(".")[0] or match["rest"], int(match["number"])


def _squares(old: Tensor, new: Tensor) -> tuple[float, float]:
    """‖new − old‖² and ‖old‖², in fp64 sums of fp32 squares, of the larger shape with zeros where one has no entry."""
    old, new = old.detach(), new.detach().to(old.device)
    shared = tuple(slice(0, min(sizes)) for sizes in zip(old.shape, new.shape, strict=True))
    inside = _square(new[shared].float() - old[shared].float())
    beyond = (
        sum(_square(part) - _square(part[shared]) for part in (old, new)) if old.shape != new.shape else 0.0
    )
    return inside + max(0.0, beyond), _square(old)


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float32).double() ** 2)


def _ratio(change: float, size: float) -> float | None:
    """None: all of it was zero before, and is not now."""
    if size == 0:
        return 0.0 if change == 0 else None
    return math.sqrt(change / size)
