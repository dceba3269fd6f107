"""What the models predict of kernels whose speed others have measured and published.

The kernels are of the published algorithm, in the form and with the tile that is compiled here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gradroute.backends import triton as primitives
from gradroute.kernels.launch import Launch
from gradroute.primitives.attention_pattern import Pattern

from . import model
from .chips import CHIPS
from .compiling import compiled
from .launches import OWN, matrix
from .occupancy import blocks_per_multiprocessor
from .rows import product_loops
from .sass import GLOBAL_STORES, width

BLOCK = 1024  # elements that a program copies


class Published(NamedTuple):
    """A published measurement.

    Attributes:
        what: what was measured.
        chip: a name in `chips.CHIPS`.
        figure: the measurement.
        unit: its unit.
        source: where it was published.
        predict: what the model predicts, in the same unit, and of which kernel, in words.
    """

    what: str
    chip: str
    figure: float
    unit: str
    source: str
    predict: Callable[[str], tuple[float, str]]


@triton.jit
def copy_kernel(x, out, number, BLOCK: tl.constexpr):
    """out = x."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, tl.load(x + place, mask=place < number), mask=place < number)


def copied(name: str) -> tuple[float, str]:
    """GB/s of a copy in bf16."""
    chip, number = CHIPS[name], 2**28
    x, out = matrix(number), matrix(number)
    launch = Launch(copy_kernel, {"num_warps": 4}, {"x": x, "out": out, "number": number, "BLOCK": BLOCK})
    code = compiled(launch, chip.architecture)
    blocks = blocks_per_multiprocessor(chip.rates, code.warps, code.registers, code.shared)
    body = code.kernel.body(None)
    stored = sum(width(one.operation) / 8 * 32 * code.warps for one in body if one.opcode in GLOBAL_STORES)
    found = model.moved(body, code.warps, blocks, False, 2 * stored, chip)
    speed = 2 * stored / found.took / chip.bytes_per_clock * chip.bandwidth
    return speed, f"a copy of {BLOCK} elements a program, {code.warps} warps"


def attended(name: str) -> tuple[float, str]:
    """TFLOP/s of the forward without a causal mask, B 4, H 16, S 4096, D 128: all tiles are whole."""
    chip = CHIPS[name]
    q, k, v = (matrix(4, 16, 4096, 128) for _ in range(3))
    with primitives.record(chip.architecture) as launches:
        none: Any = _NO_SITES
        primitives.attention_forward(q, k, v, None, none, Pattern(False, None, 128**-0.5), OWN)
    code = compiled(launches[-1], chip.architecture)
    config = launches[-1].config
    blocks = blocks_per_multiprocessor(chip.rates, code.warps, code.registers, code.shared)
    flop = 4.0 * config["BLOCK_Q"] * config["BLOCK_K"] * 128
    body = code.kernel.body(product_loops(code.kernel)[0])
    speed = model.multiplied(body, code.warps, blocks, flop, chip).share * chip.peak * model.LOADED_CLOCK
    return speed, f"our attention forward, not causal, {config['BLOCK_Q']} × {config['BLOCK_K']} tiles"


class _NoSites(NamedTuple):
    forward_heads: torch.Tensor | None = None


_NO_SITES = _NoSites()

PUBLISHED = (
    Published(
        "Triton's fused-attention tutorial, forward, B 4, H 16, S 4096, D 128, fp16",
        "H100",
        458.359,
        "TFLOP/s",
        "https://github.com/pytorch/benchmark/pull/2391",
        attended,
    ),
    Published(
        "Triton's fused-attention, forward, H × D 2048, S 4096, D 128, fp16",
        "H100",
        389,
        "TFLOP/s",
        "Shah et al., FlashAttention-3 (arXiv 2407.08608), figure of the forward's speed at head dim 128",
        attended,
    ),
    Published(
        "a copy of one large tensor in bf16",
        "H200",
        4300,
        "GB/s",
        "measured on an H200 for this project: the copy ceiling of its notes",
        copied,
    ),
)


def calibrated() -> list[dict[str, Any]]:
    """Each published figure beside its prediction."""
    found = []
    for one in PUBLISHED:
        predicted, compiled_for_it = one.predict(one.chip)
        found.append(
            {
                "what": one.what,
                "chip": CHIPS[one.chip].name,
                "published": one.figure,
                "predicted": predicted,
                "unit": one.unit,
                "source": one.source,
                "compiled": compiled_for_it,
            }
        )
    return found
