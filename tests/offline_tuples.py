"""Compiles the masked product, whose kernel takes tuples, and a twin that takes every element as an argument.

`python tests/offline_tuples.py` prints one JSON line a case: how often each kernel reads and writes global memory, by
the instruction and its width, and its registers. It must run without TRITON_INTERPRET.
"""

import collections
import itertools
import json
import re

import offline
import torch
import triton
import triton.language as tl
from triton.compiler import ASTSource

from bench.static.compiling import assembled, options_of, resources
from gradroute.kernels import launch, route_grad
from gradroute.kernels.masks import Routing, load_tokens, load_weights
from gradroute.kernels.matrices import Matrix, load_tile, pointers
from gradroute.kernels.rounding import rounded

ARCHITECTURE = 90
ACCESS = re.compile(r"\b(?:ld|st)\.global[\w.:]*|\bcp\.async[\w.]*")


@triton.jit
def flat_kernel(
    g,
    g_row_stride,
    g_col_stride,
    out,
    out_row_stride,
    out_col_stride,
    ids,
    strength,
    strength_stride,
    weights,  # Weights: a tuple that a kernel makes has no constants
    num_tokens,
    num_features,
    IN_PLACE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """masked_product_kernel, less its branches for IN_PLACE; tuples are made here instead of on the host."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    features = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    present, inside = rows < num_tokens, features < num_features
    routing = Routing(ids, strength, strength_stride)
    changed = present[:, None] & inside[None, :]
    tokens = load_tokens(routing, rows, present)
    g_tile = load_tile(Matrix(g, g_row_stride, g_col_stride), rows, features, changed)
    tl.debug_barrier()
    m = load_weights(weights, routing, tokens, features, inside)
    product = rounded(m * tl.where(m == 0.0, 0.0, g_tile.to(tl.float32)), out.dtype.element_ty)
    tl.store(pointers(Matrix(out, out_row_stride, out_col_stride), rows, features), product, mask=changed)


def flattened(tupled):
    """The same launch of the kernel without tuples."""
    given = tupled.arguments
    elements = [*given["g"], *given["out"], *given["routing"]]
    names = [parameter.name for parameter in flat_kernel.params]
    arguments = dict(zip(names, elements, strict=False))
    others = {name: given[name] for name in ("weights", "num_tokens", "num_features", "IN_PLACE")}
    return launch.Launch(flat_kernel, tupled.config, arguments | others)


def compiled(recorded):
    """Accesses of global memory and registers, specialised by Triton's own binder."""
    source = ASTSource(recorded.kernel, *offline.runtime_arguments(recorded, ARCHITECTURE))
    options = {"enable_fp_fusion": True} | options_of(recorded)
    binary, said = assembled(source, ARCHITECTURE, options)
    registers, spilled = resources(said)
    accesses = collections.Counter(ACCESS.findall(binary.asm["ptx"]))
    return {"accesses": dict(sorted(accesses.items())), "registers": registers, "spilled": spilled}


def reports():
    """Widths at which addresses are divisible by 16, and odd ones; both kinds of tables; with a strength or not."""
    for features, broadcast, has_strength in itertools.product((256, 131), (False, True), (False, True)):
        g = torch.zeros(64, features, dtype=torch.bfloat16)
        weights = torch.ones(4, 1 if broadcast else features)
        strength = torch.ones(64) if has_strength else None
        with launch.record(ARCHITECTURE) as launches:
            route_grad.masked_product_op(g, torch.zeros(64, dtype=torch.int32), strength, weights)
        (tupled,) = launches
        yield {
            "features": features,
            "tuples": compiled(tupled),
            "flat": compiled(flattened(tupled)),
        }


if __name__ == "__main__":
    for report in reports():
        print(json.dumps(report), flush=True)
