"""RoutedAdamW: the state that is saved, copied and loaded, also from torch's AdamW; every refusal."""

import copy
import pickle

import pytest
import torch
from optim_cases import assert_same, fill_gradients, parameter, parameters_of, same, snapshot
from torch import nn

from gradroute.optim import RoutedAdamW


def trained(block_dim=0, **options):
    weights = [parameter(4, 3, dtype=torch.bfloat16), parameter(5, 2)]
    optimizer = RoutedAdamW(weights, block_dim=block_dim, **options)
    for _ in range(3):
        fill_gradients(optimizer, touched=True)
        weights[0].grad[1] = 0
        optimizer.step()
    return optimizer


def steps_agree(one, other):
    for seed in range(2):
        torch.manual_seed(seed)
        fill_gradients(one, other)
        one.step()
        other.step()
    assert_same(snapshot(one), snapshot(other))


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
