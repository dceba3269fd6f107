"""RoutedAdamW: the state that is saved, copied and loaded, also from torch's AdamW; every refusal."""

import copy
import io
import pickle

import pytest
import torch
from optim_cases import (
    MOMENTS,
    assert_same,
    fill_gradients,
    parameter,
    parameters_of,
    same,
    snapshot,
    steps_agree,
)
from torch import nn

from gradroute.backends import native
from gradroute.optim import RoutedAdamW

needs_native = pytest.mark.skipif(native.module is None, reason=str(native.load_error))


def trained(block_dim=0, **options):
    weights = [parameter(4, 3, dtype=torch.bfloat16), parameter(5, 2)]
    optimizer = RoutedAdamW(weights, block_dim=block_dim, **options)
    for _ in range(3):
        fill_gradients(optimizer, touched=True)
        weights[0].grad[1] = 0
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("block_dim", [0, 1, None])
def test_state_dict_round_trip(block_dim):
    optimizer = trained(block_dim, amsgrad=True)
    other = RoutedAdamW([nn.Parameter(p.detach().clone()) for p in parameters_of(optimizer)], lr=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(snapshot(other), snapshot(optimizer))
    assert other.param_groups[0]["block_dim"] == block_dim
    assert all(state["step"].dtype == torch.float32 for state in other.state.values())
    steps_agree(optimizer, other)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies(how):
    optimizer = trained()
    steps_agree(optimizer, how(optimizer))


def test_a_state_is_loaded_to_the_parameters_device(tmp_path):
    optimizer = trained()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other = RoutedAdamW([nn.Parameter(p.detach().to("meta")) for p in parameters_of(optimizer)])
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    tensors = [value for state in other.state.values() for value in state.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert [tensor.shape for state in other.state.values() for tensor in [state["step"]]] == [(4, 1), (5, 1)]


@pytest.mark.parametrize("block_dim", [0, 1, None])
@pytest.mark.parametrize("foreach", [False, True])
def test_the_state_of_torchs_adamw(block_dim, foreach):
    weights = [parameter(4, 3), parameter(5, 2)]
    theirs = torch.optim.AdamW(weights, lr=0.1, betas=(0.8, 0.9), foreach=foreach)
    for _ in range(3):
        fill_gradients(theirs)
        theirs.step()
    state = copy.deepcopy(theirs.state_dict())
    ours = RoutedAdamW([nn.Parameter(p.detach().clone()) for p in weights], block_dim=block_dim)
    ours.load_state_dict(copy.deepcopy(state))
    assert not {"foreach", "capturable"} & ours.param_groups[0].keys()
    assert ours.param_groups[0]["fused"] is False
    assert ours.param_groups[0]["block_dim"] == block_dim
    assert ours.param_groups[0]["lr"] == 0.1
    assert all((one["step"] == 3).all() for one in ours.state.values())
    alone = torch.optim.AdamW([nn.Parameter(p.detach().clone()) for p in weights], foreach=False)
    alone.load_state_dict(
        theirs.state_dict()
        | {"param_groups": [theirs.param_groups[0] | {"foreach": False, "params": [0, 1]}]}
    )
    for _ in range(2):
        fill_gradients(ours, alone)
        ours.step()
        alone.step()
    assert all(map(same, parameters_of(ours), parameters_of(alone)))


def test_states_that_are_refused():
    weight = parameter(4, 3)
    weight.grad = torch.ones(4, 3)
    adam = torch.optim.Adam([weight])
    adam.step()
    with pytest.raises(ValueError, match="adds weight decay to the gradient"):
        RoutedAdamW([weight]).load_state_dict(adam.state_dict())
    columns = RoutedAdamW([weight], block_dim=1)
    columns.step()
    state = columns.state_dict()
    state["param_groups"][0]["block_dim"] = 0
    message = (
        r"got steps of shape \[1, 3\] for a parameter of shape \[4, 3\] and block_dim=0, expected \[4, 1\]"
    )
    with pytest.raises(ValueError, match=message):
        RoutedAdamW([weight]).load_state_dict(state)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        RoutedAdamW([weight]).load_state_dict({"state": {}, "param_groups": []})
    columns.param_groups[0]["block_dim"] = 0
    with pytest.raises(
        ValueError, match=r"block_dim: got 0 for .* \[4, 3\] whose steps are counted in .* \[1, 3\]"
    ):
        columns.step()


def test_a_state_of_other_shapes_is_refused_whole():
    saved = trained(lr=0.5)
    state = saved.state_dict()
    for shapes, message in (
        (((4, 3), (6, 2)), r"got steps of shape \[5, 1\] for a parameter of shape \[6, 2\]"),
        # The steps fit, because there are as many rows as before.
        (((4, 3), (5, 7)), r"got exp_avg of shape \[5, 2\] for a parameter of shape \[5, 7\], expected the"),
    ):
        optimizer = RoutedAdamW([parameter(*shape) for shape in shapes], lr=0.1)
        fill_gradients(optimizer)
        optimizer.step()
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match="state_dict: " + message):
            optimizer.load_state_dict(copy.deepcopy(state))
        assert_same(snapshot(optimizer), before)
        assert optimizer.param_groups[0]["lr"] == 0.1
    theirs = torch.optim.AdamW([parameter(4, 3)])
    fill_gradients(theirs)
    theirs.step()
    optimizer = RoutedAdamW([parameter(4, 5)])
    with pytest.raises(ValueError, match=r"state_dict: got exp_avg of shape \[4, 3\]"):
        optimizer.load_state_dict(theirs.state_dict())
    assert len(optimizer.state) == 0


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_native)])
def test_moments_in_bfloat16_fade_without_bias_and_keep_what_is_not_touched(fused):
    """v fades by 0.999 a step, which no bf16 rounded to the nearest does; untouched rows keep every bit."""
    weight = nn.Parameter(torch.randn(3, 4096))
    optimizer = RoutedAdamW([weight], lr=0.0, fused=fused, state_dtype=torch.bfloat16, amsgrad=True)
    weight.grad = torch.full_like(weight, 1.0)
    optimizer.step()
    state = optimizer.state[weight]
    before = {name: value.clone() for name, value in state.items()}
    first = state["exp_avg_sq"][0].double().mean()
    weight.grad = torch.full_like(weight, 1e-9)
    weight.grad[1] = 0
    for _ in range(30):
        optimizer.step()
    assert {state[name].dtype for name in MOMENTS} == {torch.bfloat16}
    for name, value in before.items():
        assert same(state[name][1], value[1])
    # The error of the mean of 8192 roundings at random, 30 times: under 1e-4 of v; rounded to the nearest, 3e-2.
    assert abs(state["exp_avg_sq"][[0, 2]].double().mean() / first - 0.999**30) < 2e-3
    assert same(state["max_exp_avg_sq"], before["max_exp_avg_sq"])


@needs_native
def test_backends_round_moments_by_the_same_bits():
    weight = nn.Parameter(torch.randn(40, 30))
    other = copy.deepcopy(weight)
    optimizers = [
        RoutedAdamW([w], fused=w is weight, state_dtype=torch.bfloat16, weight_decay=0.0)
        for w in (weight, other)
    ]
    fill_gradients(*optimizers)
    for optimizer in optimizers:
        optimizer.step()
    one, two = (o.state[w] for o, w in zip(optimizers, (weight, other), strict=True))
    for name in MOMENTS[
        :2
    ]:  # a product may be fused into a sum, and so cross a boundary, in one element of many
        assert (one[name] != two[name]).float().mean() < 1e-2
        assert not same(one[name], one[name].float().mul(1 + 2**-7).bfloat16())


@pytest.mark.parametrize("saved_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own_dtype", [None, torch.float32, torch.bfloat16])
def test_loaded_moments_have_the_dtype_of_their_optimizer(saved_dtype, own_dtype):
    saved = trained(state_dtype=saved_dtype)
    own = RoutedAdamW([nn.Parameter(p.detach().clone()) for p in parameters_of(saved)], state_dtype=own_dtype)
    own.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert own.param_groups[0]["state_dtype"] == own_dtype
    for mine, theirs in zip(parameters_of(own), parameters_of(saved), strict=True):
        for name in MOMENTS[:2]:
            dtype = mine.dtype if own_dtype is None else own_dtype
            assert same(own.state[mine][name], saved.state[theirs][name].to(dtype))
    if own_dtype == saved_dtype:
        steps_agree(saved, own)


@pytest.mark.parametrize("state_dtype", [torch.float16, "int8", 16])
def test_dtypes_of_moments_that_are_refused(state_dtype):
    with pytest.raises(ValueError, match=r"state_dtype: got .*, expected None, torch.float32, torch.bf"):
        RoutedAdamW([parameter(2)], state_dtype=state_dtype)
    with pytest.raises(ValueError, match=r"state_dtype: got .* for a parameter of torch.float64"):
        RoutedAdamW([parameter(2, dtype=torch.float64)], state_dtype=torch.bfloat16)


def _counts(optimizer):
    return [optimizer.state[p]["step"] for group in optimizer.param_groups for p in group["params"]]


def _trained(optimizer, steps, missing=()):
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for index, weight in enumerate(group["params"]):
                gradient = torch.randn(weight.shape, generator=generator)
                gradient[:1] *= index % 2  # of every second parameter the first row is not touched
                weight.grad = None if index in missing else gradient
        optimizer.step()


def test_counts_lie_side_by_side_and_are_each_parameters_own():
    """Wherever they have come to lie: copied, loaded, replaced, or without that of a parameter without gradient."""
    parameters = [torch.nn.Parameter(torch.ones(3, 2)) for _ in range(4)]
    optimizer = RoutedAdamW(parameters)
    _trained(optimizer, 2)
    storage = optimizer.state[parameters[0]]["step"].untyped_storage().data_ptr()
    assert all(count.untyped_storage().data_ptr() == storage for count in _counts(optimizer))
    held = optimizer.state[parameters[0]]["step"]
    _trained(optimizer, 1)
    assert optimizer.state[parameters[0]]["step"] is held  # counted where it lies
    _trained(optimizer, 1, missing={2})
    copied = copy.deepcopy(optimizer)
    _trained(copied, 1)
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    optimizer.load_state_dict(torch.load(saved))
    optimizer.state[parameters[1]]["step"] = optimizer.state[parameters[1]]["step"].clone()
    _trained(optimizer, 1)
    for one in (optimizer, copied):
        expected = [[0, 5, 5], [5, 5, 5], [0, 4, 4], [5, 5, 5]]
        assert [count.flatten().tolist() for count in _counts(one)] == expected
