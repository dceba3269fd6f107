"""The functions of `gradroute/backends/fa4/device.py`, compiled by the CuTe DSL for the CPU."""

import cutlass
import cutlass.cute as cute
from cutlass.cute.runtime import from_dlpack
from flash_attn.cute.utils import scalar_to_ssa

from gradroute.backends.fa4 import device


@cute.jit
def every_mask(mask: cutlass.Constexpr, out: cute.Tensor, tensors: list):
    batches, queries, keys = out.shape
    for b in range(batches):
        for i in range(queries):
            for j in range(keys):
                batch, query, key = index(b), index(i), index(j)
                seen = mask(batch, index(0), query, key, None, tensors)
                out[b, i, j] = cutlass.Float32(cutlass.Int32(seen[0]))


@cute.jit
def every_score(change: cutlass.Constexpr, out: cute.Tensor, tensors: list):
    batches, queries, keys = out.shape
    for b in range(batches):
        for i in range(queries):
            for j in range(keys):
                batch, query, key = index(b), index(i), index(j)
                score = scalar_to_ssa(out[b, i, j], cutlass.Float32)
                out[b, i, j] = change(score, batch, index(0), query, key, None, tensors)[0]


@cute.jit
def every_gradient(change: cutlass.Constexpr, out: cute.Tensor, tensors: list):
    batches, queries, keys = out.shape
    for b in range(batches):
        for i in range(queries):
            for j in range(keys):
                batch, query, key = index(b), index(i), index(j)
                gradient = scalar_to_ssa(out[b, i, j], cutlass.Float32)
                out[b, i, j] = change(gradient, gradient, batch, index(0), query, key, None, tensors)[0]


@cute.jit
def index(number):
    return scalar_to_ssa(number, cutlass.Int32)


def evaluated(every, function, operands, given):
    """What a function of the device makes of `given [B, S, S]`, element by element."""
    out = given.clone()
    tensors = [from_dlpack(t.contiguous()) for t in device.auxiliary(operands)]
    every(function, from_dlpack(out), tensors)
    return out
