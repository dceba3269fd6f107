"""Small cases of the benchmark, for its tests."""

import functools
from pathlib import Path

import torch

from bench import (
    op_table,
    ops,
    suites,
)
from bench.cases import FORWARD, FULL, Plan
from bench.settings import Setting

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
EAGER = ops.Options(CPU, with_compiled=False)
OPS = tuple(op_table.OPS)


def setting_of(op, **values):
    """A small setting of an op, with an odd number of everything."""
    return suites.with_sites(Setting(op, **({"tokens": 37, "d_model": 20, "d_ff": 72} | values)))


def wrong_glu_backward(dz, gate, *rest, **keywords):
    return (*[gate.detach()] * 3, None, None)


def plan_of(name="tiny", limits=(), **values):
    setting = setting_of("routed_linear", sites="update", tables="refuse", share=0.5, **values)
    make = functools.partial(ops.case, setting, EAGER, (FORWARD, FULL), limits, True)
    return Plan("linear", name, "routed_linear", setting.axes, make)
