"""An estimate as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def text(estimate: Mapping[str, Any]) -> str:
    """The tables of an estimate, in GB of 10^9 bytes."""
    parts = [_heading(estimate), _static(estimate["static"])]
    parts += [_length(entry, estimate) for entry in estimate["lengths"]]
    parts.append("Assumptions:\n" + "\n".join(f"- {line}." for line in estimate["assumptions"]))
    return "\n\n".join(parts)


def _heading(estimate: Mapping[str, Any]) -> str:
    model, settings = estimate["model"], estimate["settings"]
    checkpointing = "on" if settings["activation_checkpointing"] else "off"
    words = [
        f"{model['class']}, {model['parameters']:,} parameters, {model['trainable']:,} of them trained",
        f"parameters {settings['dtype']}, products {settings['precision']}, optimizer {settings['optimizer']}, "
        f"states {settings['states']}, activation checkpointing {checkpointing}, "
        f"{'routed' if settings['routed'] else 'not routed'}",
    ]
    return "\n".join(words)


def _static(static: Mapping[str, Any]) -> str:
    names = {
        "parameters": "parameters",
        "gradients": "gradients (in the backward and the optimizer's step)",
        "moments": "optimizer: moments",
        "counts": "optimizer: step counts",
        "buffers": "buffers",
        "tables": "routing tables",
    }
    rows = [[words, gb(static[name])] for name, words in names.items()]
    return "In all, before it is shared among GPUs:\n" + columns([["", "GB"], *rows])


def _length(entry: Mapping[str, Any], estimate: Mapping[str, Any]) -> str:
    gpus = [each["gpus"] for each in entry["largest"]]
    capacity, reserve = estimate["gpu"]["bytes"] / 1e9, estimate["gpu"]["reserve"]
    head = ["rows", "activations", "logits", "most in a step", "routing adds"]
    head += [f"{n} GPU{'s' * (n > 1)}" for n in gpus]
    rows = [
        [
            str(batch["rows"]),
            *(gb(batch[name]) for name in ("activations", "logits", "peak_of_step", "routing_adds")),
            *(gb(each["peak"]) + ("" if each["fits"] else " no") for each in batch["gpus"]),
        ]
        for batch in entry["batches"]
    ]
    largest = ", ".join(
        f"{each['gpus']} GPU{'s' * (each['gpus'] > 1)}: {each['rows']}" for each in entry["largest"]
    )
    return (
        f"Rows of {entry['length']} tokens on each GPU, in GB; no: does not fit {capacity:g} GB less {reserve:.0%}\n"
        f"{columns([head, *rows])}\nLargest number of rows that fits: {largest}"
    )


def gb(count: float) -> str:
    """Bytes as GB with three digits."""
    value = count / 1e9
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)
