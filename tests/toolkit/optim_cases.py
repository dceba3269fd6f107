"""Shared by the tests of RoutedAdamW: tensors, optimizers side by side, and comparisons of every bit."""

import copy

import torch
from torch import nn

from gradroute.optim import RoutedAdamW

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def bits(tensor):
    return tensor.detach().contiguous().view(INTEGERS[tensor.itemsize])


def same(one, other):
    """Bit for bit, the sign of zero and what NaN carries too."""
    return one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def same_numbers(one, other):
    """Bit for bit, but every NaN is as good as another."""
    nan = torch.isnan(one)
    return torch.equal(nan, torch.isnan(other)) and same(one.masked_fill(nan, 0), other.masked_fill(nan, 0))


def equal(one, other):
    """Every NaN is as good as another, and 0 as -0.

    Where β₁ ≤ 0.5, torch.lerp makes 0 or -0 of -0, by where an element lies in memory.
    """
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(7e3), other.nan_to_num(7e3))


def parameter(*shape, dtype=torch.float32):
    return nn.Parameter(torch.randn(shape).to(dtype))


def gradient_of(shape, dtype, touched=True):
    """Random numbers of which none is 0, but where `touched` is False: zeros of both signs."""
    random = torch.randn(shape)
    random = torch.where(random.abs() < 1e-2, 1.0, random)
    zeros = torch.where(torch.rand(shape) < 0.5, 0.0, -0.0)
    return torch.where(torch.as_tensor(touched), random, zeros).to(dtype)


def snapshot(optimizer):
    """Copies of parameters and state, in order."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [
        (p.detach().clone(), {name: value.clone() for name, value in optimizer.state[p].items()})
        for p in parameters
    ]


def assert_same(got, want):
    assert len(got) == len(want)
    for (one, state), (other, expected) in zip(got, want, strict=True):
        assert same(one, other)
        assert state.keys() == expected.keys()
        assert all(same(state[name], expected[name]) for name in expected)


def both_optimizers():
    """Ours and torch's, each with two groups of equal parameters of several dtypes."""
    first = [parameter(3, 4), parameter(5), parameter(2, 3, dtype=torch.bfloat16)]
    second = [parameter(2, 3, 2), parameter()]
    groups = [{"params": first}, {"params": second, "lr": 0.1, "weight_decay": 0.2, "betas": (0.5, 0.6)}]
    copies = copy.deepcopy(groups)
    return RoutedAdamW(groups), torch.optim.AdamW(copies, foreach=False)


def fill_gradients(*optimizers, **options):
    for parameters in zip(
        *([p for group in o.param_groups for p in group["params"]] for o in optimizers), strict=True
    ):
        gradient = gradient_of(parameters[0].shape, parameters[0].dtype, **options)
        for p in parameters:
            p.grad = gradient.clone()


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def steps_agree(one, other):
    """Two optimizers take the same steps, bit for bit."""
    for seed in range(2):
        torch.manual_seed(seed)
        fill_gradients(one, other)
        one.step()
        other.step()
    assert_same(snapshot(one), snapshot(other))
