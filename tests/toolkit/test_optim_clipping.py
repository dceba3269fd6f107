"""RoutedAdamW.clip_grad_norm_: torch's clipping, which touches no block that was not touched."""

import math

import pytest
import torch
from optim_cases import both_optimizers, fill_gradients, gradient_of, parameter, parameters_of, same
from torch import nn

from gradroute.optim import RoutedAdamW


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.5, math.inf])
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clipping_is_torchs(norm_type, max_norm):
    ours, theirs = both_optimizers()
    fill_gradients(ours, theirs)
    norm = ours.clip_grad_norm_(max_norm, norm_type)
    expected = nn.utils.clip_grad_norm_(parameters_of(theirs), max_norm, norm_type)
    assert same(norm, expected)
    assert all(same(p.grad, q.grad) for p, q in zip(parameters_of(ours), parameters_of(theirs), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_clipping_in_one_dtype_is_torchs(dtype):
    weight = parameter(5, 7, dtype=dtype)
    weight.grad = gradient_of((5, 7), dtype)
    gradient = weight.grad.clone()
    norm = RoutedAdamW([weight]).clip_grad_norm_(0.5)
    clipped = weight.grad
    weight.grad = gradient
    assert same(nn.utils.clip_grad_norm_([weight], 0.5), norm)
    assert same(weight.grad, clipped)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_touches_nothing_else(value):
    weight, other = parameter(3, 2), parameter(2, 3)
    weight.grad, other.grad = torch.zeros(3, 2), torch.zeros(2, 3)
    weight.grad[1] = torch.tensor([value, 1.0])
    optimizer = RoutedAdamW([{"params": [weight]}, {"params": [other], "block_dim": 1}])
    torchs = weight.grad.clone()
    nn.utils.clip_grads_with_norm_([weight], 1.0, nn.utils.get_total_norm([torchs]))
    assert torch.isnan(weight.grad).sum() == (
        6 if math.isnan(value) else 1
    )  # torch's clipping touches every row by NaN
    weight.grad = torchs
    with pytest.raises(RuntimeError, match=rf"error_if_nonfinite: got gradients of norm {value}"):
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    norm = optimizer.clip_grad_norm_(1.0)
    assert math.isnan(norm) if math.isnan(value) else norm == value
    assert same(weight.grad[[0, 2]], torch.zeros(2, 2))
    assert same(other.grad, torch.zeros(2, 3))
    assert torch.isnan(weight.grad[1, 0])
    assert optimizer.param_groups[0]["params"] == [weight]


def test_clipping_without_gradients():
    assert RoutedAdamW([parameter(2)]).clip_grad_norm_(1.0) == 0
