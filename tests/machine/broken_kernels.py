"""Kernels that are wrong in every way that a check is for, each in place of a backend's masked product.

They are right but for one thing. What lies outside of a tensor they reach as a kernel does, by its address and strides.
"""

import itertools
import os
import signal
import time

import torch

from gradroute.backends import composed

right = composed.masked_product
_calls = itertools.count()


def beyond(tensor, rows=1, before=0):
    """The rows of a matrix, and some behind and before it."""
    width, (step, column) = tensor.shape[1], tensor.stride()
    start = tensor.storage_offset() - before * step
    return tensor.as_strided((tensor.shape[0] + rows + before, width), (step, column), start)


def product(g, routes, table):
    """The right product, in memory that the launcher allocates."""
    out = g.new_empty(g.shape)
    out.copy_(right(g, routes, table))
    return out


def wrong_in_bfloat16(g, routes, table, *, overwrite=False):
    return product(g, routes, table) * (1.05 if g.dtype == torch.bfloat16 else 1)


def forgets_the_mask(g, routes, table, *, overwrite=False):
    return g.clone()


def another_bit_every_time(g, routes, table, *, overwrite=False):
    out = product(g, routes, table)
    return out + (next(_calls) % 2) * torch.finfo(out.dtype).eps * out


def reads_a_row_too_far(g, routes, table, *, overwrite=False):
    out = product(g, routes, table)
    out[-1:] += 1e-9 * beyond(g)[-1:]
    return out


def reads_a_row_too_early(g, routes, table, *, overwrite=False):
    out = product(g, routes, table)
    out[:1] += 1e-9 * beyond(g, before=1)[:1]
    return out


def reads_a_column_too_far(g, routes, table, *, overwrite=False):
    """The last row's element is outside, those of rows that are apart are between them."""
    out = product(g, routes, table)
    out[-1:, -1:] += 1e-9 * beyond(g, rows=0).as_strided((1, 1), g.stride(), _behind_last(g))
    return out


def writes_a_row_too_far(g, routes, table, *, overwrite=False):
    out = product(g, routes, table)
    beyond(out)[-1:] = 1
    return out


def writes_before_the_first_row(g, routes, table, *, overwrite=False):
    out = product(g, routes, table)
    beyond(out, before=1)[:1, -1] = 1
    return out


def takes_a_row_too_many(g, routes, table, *, overwrite=False):
    """It reads the row behind the input, and writes its product behind the output."""
    out = product(g, routes, table)
    beyond(out)[-1:] = beyond(g)[-1:] * 0.5
    return out


def masks_its_input_a_row_too_far(g, routes, table, *, overwrite=False):
    """It multiplies what lies behind the input in place."""
    out = product(g, routes, table)
    beyond(g)[-1:] *= 0.5
    return out


def writes_into_its_input(g, routes, table, *, overwrite=False):
    out = product(g, routes, table)
    g[-1:, :1] += 1
    return out


def leaves_the_last_row_out(g, routes, table, *, overwrite=False):
    out = g.new_empty(g.shape)
    out[:-1] = right(g, routes, table)[:-1]
    return out


def counts_in_32_bits(g, routes, table, *, overwrite=False):
    """It takes the first row where a row's offset has more than 31 bits."""
    offsets = torch.arange(g.shape[0]) * g.stride(0)
    return product(torch.where((offsets < 2**31)[:, None], g, g[:1]), routes, table)


def fails(g, routes, table, *, overwrite=False):
    raise RuntimeError("no kernel image is available\nand more")


def crashes_in_float16(g, routes, table, *, overwrite=False):
    if g.dtype == torch.float16:
        os.kill(os.getpid(), signal.SIGSEGV)
    return product(g, routes, table)


def is_killed_in_float16(g, routes, table, *, overwrite=False):
    if g.dtype == torch.float16:
        os.kill(os.getpid(), signal.SIGKILL)
    return product(g, routes, table)


def hangs_in_float16(g, routes, table, *, overwrite=False):
    if g.dtype == torch.float16:
        time.sleep(10**6)
    return product(g, routes, table)


def _behind_last(g):
    """The offset of the element behind the last one of a matrix."""
    return g.storage_offset() + (g.shape[0] - 1) * g.stride(0) + g.shape[1] * g.stride(1)
