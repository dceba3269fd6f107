"""RoutedAdamW(state_dtype="8bit"): moments as codes of torchao, whose blocks lie within the optimizer's own."""

import copy
import math
import pickle
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_cases import (
    MOMENTS,
    assert_same,
    fill_gradients,
    gradient_of,
    parameter,
    parameters_of,
    same,
    snapshot,
    steps_agree,
)
from test_optim import NoWaiting
from torch import nn

pytest.importorskip("torchao", reason="the extra torchao is not installed")

from torchao.optim.adam import single_param_adam
from torchao.optim.quant_utils import create_dynamic_map
from torchao.optim.subclass_8bit import OptimState8bit

import gradroute.era
from gradroute.backends import native
from gradroute.blocks import Block
from gradroute.optim import RoutedAdamW, quantised
from gradroute.optim.quantised import Layout, Quantised

needs_native = pytest.mark.skipif(native.module is None, reason=str(native.load_error))
FUSED = [False, pytest.param(True, marks=needs_native)]

# Half the widest gap between neighbouring values of torchao's maps, whose largest is 1: the largest error of a value
# whose scale is 1. The signed map has gaps of 0.0141 and ends at -0.993, 0.00703 above -1; the other has half of them.
HALF_GAP = {True: 0.00704, False: 0.00352}


def values_of(optimizer, weight, name):
    return Quantised.of(optimizer.state[weight], name).values()


def quantised_optimizer(*shapes, dtype=torch.float32, **options):
    weights = [parameter(*shape, dtype=dtype) for shape in shapes]
    return RoutedAdamW(weights, state_dtype="8bit", **options)


def trained(steps=3, **options):
    """An optimizer with moments in codes, and with small ones in fp32."""
    optimizer = quantised_optimizer((64, 80), (70, 96), (5, 2), **options)
    for _ in range(steps):
        fill_gradients(optimizer)
        parameters_of(optimizer)[0].grad[1] = 0
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("shape", "block_dim", "layout"),
    [
        ((64, 576), 0, Layout(1, 192)),
        ((64, 576), 1, Layout(0, 64)),
        ((64, 576), None, Layout(1, 192)),
        ((1000, 8), None, Layout(0, 250)),  # 8 elements to a scale would be too few
        ((1000, 8), 0, None),
        ((8, 4096), 1, None),
        ((32, 16, 3, 3), 0, Layout(1, 16)),
        ((32, 16, 3, 3), 1, Layout(0, 32)),
        ((32, 64, 17), 0, Layout(1, 64)),
        ((8, 2053), 0, None),  # a prime
        ((5000,), 0, None),
        ((5000,), None, Layout(0, 250)),
        ((63, 65), 0, None),  # 4095 elements
        ((64, 64), 0, Layout(1, 64)),
        ((0, 5000), 0, None),
        ((), None, None),
    ],
)
def test_which_moments_are_quantised(shape, block_dim, layout):
    """Elements that share a scale are of one block; small parameters and those without a divisor stay in fp32."""
    weight = parameter(*shape, dtype=torch.bfloat16)
    assert quantised.layout_of(weight, block_dim) == layout
    optimizer = RoutedAdamW([weight], block_dim=block_dim, state_dtype="8bit", amsgrad=True)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    if layout is None:
        assert state.keys() == {"step", *MOMENTS}
        assert all(state[name].shape == shape and state[name].dtype == torch.float32 for name in MOMENTS)
        return
    scales = list(shape)
    scales[layout.dim] //= layout.size
    assert state.keys() == {"step", *(name + end for name in MOMENTS for end in ("_codes", "_scales"))}
    for name in MOMENTS:
        codes, of_scales = state[f"{name}_codes"], state[f"{name}_scales"]
        assert (codes.shape, codes.dtype) == (shape, torch.uint8)
        assert (list(of_scales.shape), of_scales.dtype) == (scales, torch.float32)


@pytest.mark.parametrize(("amsgrad", "moments"), [(False, 2), (True, 3)])
def test_bytes_of_a_parameter(amsgrad, moments):
    """A byte an element, four a scale, four a count of steps; what step copies in fp32 is gone afterwards."""
    optimizer = quantised_optimizer((512, 1024), amsgrad=amsgrad)
    fill_gradients(optimizer)
    optimizer.step()
    (state,) = optimizer.state.values()
    found = sum(tensor.untyped_storage().nbytes() for tensor in state.values())
    count = 512 * 1024
    assert found == moments * (count + 4 * count // 256) + 4 * 512
    assert found / count < 1.02 * moments


LAWS = {
    "shape": st.sampled_from([(64, 64), (67, 80), (48, 7, 16), (40, 8, 4, 5), (4096,), (9, 3)]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    "block_dim": st.sampled_from([0, 1, None]),
    "fused": st.booleans(),
    "options": st.fixed_dictionaries(
        {
            "lr": st.sampled_from([1e-3, 0.037]),
            "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.99), (0.5, 0.9)]),
            "weight_decay": st.sampled_from([0.0, 0.3]),
            "amsgrad": st.booleans(),
            "maximize": st.booleans(),
        }
    ),
    "share": st.floats(0, 1),
}


@pytest.mark.setup("torchao", "RoutedAdamW with moments in 8 bits")
@settings(max_examples=40)
@given(**LAWS)
def test_untouched_blocks_keep_every_bit_of_codes_and_scales(shape, dtype, block_dim, fused, options, share):
    block_dim = block_dim if len(shape) >= 2 or block_dim is None else 0
    weight = parameter(*shape, dtype=dtype)
    fused = fused and native.module is not None
    optimizer = RoutedAdamW([weight], block_dim=block_dim, state_dtype="8bit", fused=fused, **options)
    weight.grad = gradient_of(shape, dtype)
    optimizer.step()
    number = 1 if block_dim is None else shape[block_dim]
    for _ in range(3):
        touched = torch.rand(number) < share
        along = [-1 if dim == block_dim else 1 for dim in range(len(shape))]
        weight.grad = gradient_of(shape, dtype, touched=touched.view(along))
        ((before, state),) = snapshot(optimizer)
        optimizer.step()
        ((after, new),) = snapshot(optimizer)
        kept = ~touched
        if block_dim is None:
            pairs = [(before, after), *((state[name], new[name]) for name in state)] if kept else []
        else:
            index = kept.nonzero()[:, 0]
            tensors = [(before, after), *((state[name], new[name]) for name in state)]
            pairs = [[tensor.index_select(block_dim, index) for tensor in pair] for pair in tensors]
        assert all(same(*pair) for pair in pairs)
        assert torch.equal((new["step"] - state["step"]).flatten(), touched.float())
        if touched.any() and dtype == torch.float32:
            assert not same(before, after)


@pytest.mark.parametrize("block_dim", [0, 1])
def test_every_block_has_an_optimizer_of_its_own(block_dim, monkeypatch):
    """A step is that of one quantised optimizer for each row or column, which steps only where it is touched."""
    monkeypatch.setattr(quantised, "SMALLEST", 1)
    weight = parameter(*((6, 512) if block_dim == 0 else (512, 6)))
    blocks = [nn.Parameter(weight.detach().select(block_dim, index).clone()) for index in range(6)]
    options = {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True, "state_dtype": "8bit"}
    whole = RoutedAdamW([weight], block_dim=block_dim, **options)
    alone = [RoutedAdamW([block], block_dim=None, **options) for block in blocks]
    for _ in range(6):
        touched = torch.rand(6) < 0.6
        weight.grad = gradient_of(
            weight.shape, weight.dtype, touched=touched[:, None] if block_dim == 0 else touched
        )
        whole.step()
        for index, (block, optimizer) in enumerate(zip(blocks, alone, strict=True)):
            block.grad = weight.grad.select(block_dim, index).clone() if touched[index] else None
            optimizer.step()
    for index, (block, optimizer) in enumerate(zip(blocks, alone, strict=True)):
        assert same(weight.select(block_dim, index), block)
        for name, value in optimizer.state[block].items():
            assert same(whole.state[weight][name].select(block_dim, index).reshape(value.shape), value), name


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_values_are_near(signed, dim, monkeypatch):
    """The error is at most half a gap of the map, times the scale, whatever the dimension and the size of pieces."""
    monkeypatch.setattr(quantised, "PIECE", 700)
    layout = Layout(dim, (4, 5, 8)[dim])
    values = torch.randn(12, 10, 16) * torch.logspace(-12, 3, 16)
    values = values if signed else values.square()
    codes = torch.zeros(values.shape, dtype=torch.uint8)
    scales = torch.zeros(layout.shape(values.shape))
    stored = Quantised(codes, scales, layout, signed)
    stored.write(values, torch.ones((), dtype=torch.bool))
    largest = values.abs().unflatten(dim, (-1, layout.size)).amax(dim + 1)
    torch.testing.assert_close(scales, largest.clamp(min=1e-12), rtol=0, atol=0)
    of_each = scales.repeat_interleave(layout.size, dim)
    assert ((stored.values() - values).abs() <= HALF_GAP[signed] * of_each).all()
    if not signed:
        assert (stored.values() > 0).all()
    table = torch.tensor(create_dynamic_map(signed))
    assert torch.equal(stored.values(), table[codes.long()] * of_each)


def test_where_everything_is_touched_it_is_torchaos():
    """Codes of the first moment are bit for bit torchao's; sums of squares are rounded in another order.

    Changes of parameters differ by bias corrections, which torchao computes in fp32: 1 - 0.999 loses 6e-5 of itself.
    """
    ours = parameter(32, 512)
    theirs = ours.detach().clone()
    options = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = RoutedAdamW([ours], state_dtype="8bit", **options)
    first, second = (OptimState8bit.zeros(theirs.shape, signed) for signed in (True, False))
    before = ours.detach().clone()
    for step in range(1, 4):
        # None is so small beside others that its square's code is 0.
        ours.grad = (torch.rand(32, 512) + 0.5) * torch.randn(32, 512).sign()
        optimizer.step()
        single_param_adam(
            theirs,
            ours.grad,
            torch.tensor(float(step)),
            first,
            second,
            None,
            torch.tensor(options["lr"]),
            *options["betas"],
            options["weight_decay"],
            options["eps"],
            True,
            False,
        )
    state = optimizer.state[ours]
    assert torch.equal(state["exp_avg_codes"], first.codes)
    assert torch.equal(state["exp_avg_scales"].flatten(), first.scale)
    differences = (state["exp_avg_sq_codes"].int() - second.codes.int()).abs()
    assert differences.max() <= 1
    assert (differences > 0).float().mean() < 1e-3
    torch.testing.assert_close(state["exp_avg_sq_scales"].flatten(), second.scale, rtol=1e-6, atol=0)
    moved = (ours.detach() - before).abs().mean()
    assert (ours.detach() - theirs).abs().mean() < 1e-4 * moved


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", FUSED)
def test_training_is_near_that_with_moments_in_fp32(dtype, fused):
    """Forty steps of a regression, half of whose rows are touched in each, end near one another.

    Measured: 1.3e-2 of the distance that the parameters went, 1.5e-2 in bfloat16. A code's error is 7e-3 of the largest
    value beside it at most. The budget is twice what was measured.
    """
    weights = [nn.Parameter((torch.randn(48, 256) / 16).to(dtype)) for _ in range(2)]
    weights[1].data.copy_(weights[0].data)
    optimizers = [
        RoutedAdamW([weight], 1e-2, state_dtype=state_dtype, fused=fused)
        for weight, state_dtype in zip(weights, ("8bit", torch.float32), strict=True)
    ]
    target = torch.randn(48, 256) / 4
    before = weights[0].detach().float().clone()
    for _ in range(40):
        x, mask = torch.randn(64, 256), (torch.rand(48) < 0.5).float()
        for weight, optimizer in zip(weights, optimizers, strict=True):
            optimizer.zero_grad()
            difference = x @ (weight.float() - target).T
            (difference * mask).square().mean().backward()
            optimizer.step()
    ours, theirs = (weight.detach().float() for weight in weights)
    moved, error = (theirs - before).norm(), (ours - theirs).norm()
    assert error < 3e-2 * moved
    losses = [(weight - target).square().sum() for weight in (before, theirs, ours)]
    assert losses[1] < 0.6 * losses[0]
    assert abs(losses[2] - losses[1]) < 1e-2 * losses[1]


def test_an_element_that_is_masked_alone_is_not_thrown_far():
    """Its gradient was 1e-4 of the largest of the row, then 0. A code of 0 for its square would leave ε to divide by.

    With torchao's rounding alone it went 39, which is 39,000 learning rates.
    """
    distances = []
    for state_dtype in ("8bit", torch.float32):
        weight = nn.Parameter(torch.zeros(16, 256))
        optimizer = RoutedAdamW([weight], 1e-3, weight_decay=0.0, state_dtype=state_dtype)
        weight.grad = torch.ones_like(weight)
        weight.grad[:, 0] = 1e-4
        optimizer.step()
        weight.grad[:, 0] = 0
        for _ in range(20):
            optimizer.step()
        distances.append(float(weight[:, 0].detach().abs().max()))
    assert 0 < distances[0] <= distances[1] < 0.01


@needs_native
def test_kernels_and_operations_agree():
    """Both compute in fp32; a sum rounded otherwise may cross the middle between two codes, in few elements."""
    one = trained(amsgrad=True, maximize=True, fused=False)
    other = RoutedAdamW(
        [nn.Parameter(p.detach().clone()) for p in parameters_of(one)],
        state_dtype="8bit",
        amsgrad=True,
        maximize=True,
        fused=True,
    )
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert other.param_groups[0]["fused"]
    fill_gradients(one, other)
    one.step()
    other.step()
    for (p, state), (q, expected) in zip(snapshot(one), snapshot(other), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for name, value in state.items():
            if name.endswith("_codes"):
                assert (value != expected[name]).float().mean() < 1e-2
            else:
                torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-9)


def test_groups_may_differ():
    """Groups with and without codes, by rows and by columns, step side by side as each by itself."""
    shapes, dims = [(64, 96), (64, 96), (80, 64), (70,)], [0, 1, None, 0]
    dtypes = ["8bit", "8bit", None, torch.bfloat16]
    weights = [parameter(*shape) for shape in shapes]
    copies = copy.deepcopy(weights)
    kinds = list(zip(dims, dtypes, strict=True))
    together = RoutedAdamW(
        [
            {"params": [w], "block_dim": dim, "state_dtype": dtype}
            for w, (dim, dtype) in zip(weights, kinds, strict=True)
        ]
    )
    alone = [RoutedAdamW([w], block_dim=d, state_dtype=t) for w, (d, t) in zip(copies, kinds, strict=True)]
    for _ in range(2):
        fill_gradients(together)
        for mine, other, optimizer in zip(weights, copies, alone, strict=True):
            other.grad = mine.grad.clone()
            optimizer.step()
        together.step()
    assert_same(snapshot(together), [each for optimizer in alone for each in snapshot(optimizer)])


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_learning_rate_in_a_tensor_and_ascending(amsgrad):
    weights = [parameter(64, 64)]
    weights += [copy.deepcopy(weights[0]) for _ in range(2)]
    options = {"state_dtype": "8bit", "amsgrad": amsgrad}
    number = RoutedAdamW(weights[:1], 0.125, **options)
    tensor = RoutedAdamW(weights[1:2], torch.tensor(0.125), **options)
    ascending = RoutedAdamW(weights[2:], 0.125, maximize=True, **options)
    for _ in range(3):
        fill_gradients(number, tensor, ascending)
        weights[2].grad.neg_()
        for optimizer in (number, tensor, ascending):
            optimizer.step()
    assert_same(snapshot(number), snapshot(tensor))
    assert_same(snapshot(number), snapshot(ascending))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("fused", FUSED)
def test_nan_is_not_hidden_and_stays_in_its_row(value, fused):
    optimizer = quantised_optimizer((16, 512), fused=fused)
    (weight,) = parameters_of(optimizer)
    fill_gradients(optimizer)
    optimizer.step()
    weight.grad[3, 7] = value
    optimizer.step()
    fill_gradients(optimizer)
    optimizer.step()
    assert torch.isnan(weight[3, 7])
    rest = torch.arange(16) != 3
    assert torch.isfinite(weight[rest]).all()
    assert all(torch.isfinite(values_of(optimizer, weight, name)[rest]).all() for name in MOMENTS[:2])


@pytest.mark.parametrize("block_dim", [0, 1, None])
def test_state_dict_round_trip(block_dim, tmp_path):
    optimizer = trained(block_dim=block_dim, amsgrad=True)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    for state in (
        copy.deepcopy(optimizer.state_dict()),
        torch.load(tmp_path / "optimizer.pt", weights_only=True),
    ):
        other = RoutedAdamW(
            [nn.Parameter(p.detach().clone()) for p in parameters_of(optimizer)], lr=1.0, state_dtype="8bit"
        )
        other.load_state_dict(state)
        assert_same(snapshot(other), snapshot(optimizer))
        assert other.param_groups[0]["state_dtype"] == "8bit"
    steps_agree(optimizer, other)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies(how):
    optimizer = trained()
    steps_agree(optimizer, how(optimizer))


def test_what_is_loaded_is_a_copy():
    optimizer = trained()
    other = RoutedAdamW(
        [nn.Parameter(p.detach().clone()) for p in parameters_of(optimizer)], state_dtype="8bit"
    )
    state = optimizer.state_dict()
    other.load_state_dict(state)
    before = snapshot(optimizer)
    fill_gradients(other)
    other.step()
    for (_, mine), (_, old) in zip(snapshot(optimizer), before, strict=True):
        assert all(same(mine[key], old[key]) for key in old if key != "step")  # torch shares those


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16])
def test_states_of_other_dtypes_are_converted_and_back(state_dtype, dtype):
    plain = RoutedAdamW([parameter(64, 80, dtype=dtype), parameter(5, 2)], state_dtype=state_dtype)
    for _ in range(2):
        fill_gradients(plain)
        plain.step()
    weights = parameters_of(plain)
    codes = RoutedAdamW([nn.Parameter(p.detach().clone()) for p in weights], state_dtype="8bit")
    codes.load_state_dict(copy.deepcopy(plain.state_dict()))
    back = RoutedAdamW([nn.Parameter(p.detach().clone()) for p in weights], state_dtype=state_dtype)
    back.load_state_dict(copy.deepcopy(codes.state_dict()))
    large, small = parameters_of(codes)
    assert "exp_avg_codes" in codes.state[large]
    assert "exp_avg" in codes.state[small]
    for name in MOMENTS[:2]:
        exact = plain.state[weights[0]][name]
        scales = codes.state[large][f"{name}_scales"].repeat_interleave(80, 1)
        error = (values_of(codes, large, name) - exact.float()).abs()
        assert (error <= HALF_GAP[name == "exp_avg"] * scales).all()
        again = back.state[parameters_of(back)[0]]
        assert same(again[name], values_of(codes, large, name).to(exact.dtype))
        assert same(codes.state[small][name], plain.state[weights[1]][name].float())
    assert again.keys() == {"step", *MOMENTS[:2]}
    assert same(codes.state[large]["step"], plain.state[weights[0]]["step"])
    for optimizer in (codes, back):
        fill_gradients(optimizer)
        optimizer.step()


def test_the_states_of_adamw_of_torch_and_of_torchao():
    """Both have one count of steps; torchao's moments are codes in a tensor of its own class, without names."""
    weight = parameter(16, 256)
    theirs = torch.optim.AdamW([weight], lr=0.1, foreach=False)
    for _ in range(3):
        fill_gradients(theirs)
        theirs.step()
    ours = RoutedAdamW([nn.Parameter(weight.detach().clone())], state_dtype="8bit")
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    (own,) = parameters_of(ours)
    assert ours.param_groups[0]["lr"] == 0.1
    assert (ours.state[own]["step"] == 3).all()
    state = theirs.state[weight]
    wrapped = {"step": torch.tensor(3.0)}
    for name, signed in zip(MOMENTS, (True, False), strict=False):
        error = (values_of(ours, own, name) - state[name]).abs()
        assert (error <= HALF_GAP[signed] * ours.state[own][f"{name}_scales"]).all()
        wrapped[name] = OptimState8bit.zeros(weight.shape, signed)
        wrapped[name].copy_(state[name])
    group = {
        "lr": torch.tensor(0.1),
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.01,
        "amsgrad": False,
    }
    saved = {"state": {0: wrapped}, "param_groups": [group | {"params": [0]}]}
    for state_dtype in ("8bit", None):
        other = RoutedAdamW([nn.Parameter(weight.detach().clone())], state_dtype=state_dtype)
        other.load_state_dict(saved)
        (its,) = parameters_of(other)
        for name in MOMENTS[:2]:
            found = values_of(other, its, name) if state_dtype else other.state[its][name]
            # Scales are those of torchao, or 0.993 of them, where the largest value was negative.
            scales = ours.state[own][f"{name}_scales"]
            assert ((found - wrapped[name].dequantize()).abs() <= HALF_GAP[True] * scales).all()
        fill_gradients(other)
        other.step()


def test_codes_of_other_groups_are_converted(monkeypatch):
    """Such as those of a parameter that was sharded among another number of ranks."""
    saved, loaded = (quantised_optimizer((48, 96), block_dim=1) for _ in range(2))
    fill_gradients(saved)
    with monkeypatch.context() as patched:
        patched.setattr(quantised, "MOST", 16)
        saved.step()
    (theirs,), (own,) = parameters_of(saved), parameters_of(loaded)
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert saved.state[theirs]["exp_avg_scales"].shape == (3, 96)
    assert loaded.state[own]["exp_avg_scales"].shape == (1, 96)
    for name in MOMENTS[:2]:
        error = (values_of(loaded, own, name) - values_of(saved, theirs, name)).abs()
        assert (error <= HALF_GAP[name == "exp_avg"] * loaded.state[own][f"{name}_scales"]).all()


def test_states_that_are_refused_whole():
    saved = trained(lr=0.5)
    changes = {
        r"got exp_avg_codes without exp_avg_scales, expected them": {"exp_avg_scales": None},
        r"got exp_avg_codes in torch.int8, expected torch.uint8": {
            "exp_avg_codes": torch.zeros(64, 80, dtype=torch.int8)
        },
        r"got exp_avg_scales of shape \[64, 3\] in torch.float32 beside codes of shape \[64, 80\], expected fp32": {
            "exp_avg_scales": torch.zeros(64, 3)
        },
        r"got exp_avg_scales of shape \[64\] in": {"exp_avg_scales": torch.zeros(64)},
        r"got exp_avg_scales of shape \[64, 1\] in torch.bfloat16": {
            "exp_avg_scales": torch.zeros(64, 1, dtype=torch.bfloat16)
        },
        r"got exp_avg_sq_codes of shape \[64, 8\] for a parameter of shape \[64, 80\], expected the parameter's": {
            "exp_avg_sq_codes": torch.zeros(64, 8, dtype=torch.uint8)
        },
    }
    for message, change in changes.items():
        state = copy.deepcopy(saved.state_dict())
        state["state"][0] = {
            key: value for key, value in (state["state"][0] | change).items() if value is not None
        }
        optimizer = trained(lr=0.1)
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match="state_dict: " + message):
            optimizer.load_state_dict(state)
        assert_same(snapshot(optimizer), before)
        assert optimizer.param_groups[0]["lr"] == 0.1


def without_torchao(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"]:
        monkeypatch.setitem(sys.modules, name, None)
    return re.escape(
        "state_dtype: got '8bit' without the package torchao, which quantises the moments, expected it installed: "
        "pip install 'gradroute[torchao]'"
    )


def test_without_torchao_it_is_refused(monkeypatch):
    quantised_one = trained()
    saved, pickled = quantised_one.state_dict(), pickle.dumps(quantised_one)
    optimizer = RoutedAdamW([parameter(2, 3)])
    plain = RoutedAdamW([parameter(64, 80), parameter(70, 96), parameter(5, 2)])
    message = without_torchao(monkeypatch)
    with pytest.raises(ImportError, match=message):
        quantised_optimizer((2, 3))
    with pytest.raises(ImportError, match=message):
        optimizer.add_param_group({"params": [parameter(2, 3)], "state_dtype": "8bit"})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ImportError, match=message):
        plain.load_state_dict(copy.deepcopy(saved))
    assert len(plain.state) == 0
    fill_gradients(plain)
    plain.step()
    unpickled = pickle.loads(pickled)
    before = snapshot(unpickled)
    fill_gradients(unpickled)
    with pytest.raises(ImportError, match=message):
        unpickled.step()
    assert_same(snapshot(unpickled), before)


@pytest.mark.slow
def test_torchao_is_imported_only_where_it_is_asked_for():
    code = (
        "import sys, torch, gradroute.optim as optim\n"
        "weight = torch.nn.Parameter(torch.ones(64, 64))\n"
        "optim.RoutedAdamW([weight], state_dtype=torch.bfloat16)\n"
        "assert 'torchao' not in sys.modules\n"
        "optim.RoutedAdamW([weight], state_dtype='8bit')\n"
        "assert 'torchao' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("state_dtype", [torch.uint8, torch.int8, "8bits", "4bit", 8])
def test_other_spellings_are_refused(state_dtype):
    message = r"state_dtype: got .*, expected None, torch.float32, torch.bfloat16 or '8bit'"
    with pytest.raises(ValueError, match=message):
        RoutedAdamW([parameter(2)], state_dtype=state_dtype)


def test_parameters_in_fp64_are_refused():
    with pytest.raises(ValueError, match=r"state_dtype: got 8bit for a parameter of torch.float64"):
        quantised_optimizer((64, 64), dtype=torch.float64)


def test_a_parameter_of_another_shape_is_refused():
    optimizer = quantised_optimizer((64, 64))
    (weight,) = parameters_of(optimizer)
    fill_gradients(optimizer)
    optimizer.step()
    weight.data, weight.grad = torch.ones(64, 65), None
    weight.grad = torch.ones(64, 65)
    with pytest.raises(
        ValueError, match=r"\[64, 65\] whose exp_avg_codes is of shape \[64, 64\], expected it not"
    ):
        optimizer.step()
    assert (weight == 1).all()


def test_a_gradient_of_another_layout():
    """Parameters and gradients may be transposed, and lie as they like."""
    weight = nn.Parameter(torch.randn(96, 64).T)
    expected = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    optimizers = [RoutedAdamW([w], state_dtype="8bit", block_dim=1) for w in (weight, expected)]
    for _ in range(2):
        weight.grad = torch.randn(96, 64).T
        expected.grad = weight.grad.contiguous()
        for optimizer in optimizers:
            optimizer.step()
    assert_same(*map(snapshot, optimizers))
    images = nn.Parameter(torch.randn(32, 16, 3, 3).contiguous(memory_format=torch.channels_last))
    expected = nn.Parameter(images.detach().clone(memory_format=torch.contiguous_format))
    optimizers = [RoutedAdamW([w], state_dtype="8bit") for w in (images, expected)]
    for _ in range(2):
        images.grad = torch.randn_like(images)
        expected.grad = images.grad.contiguous()
        for optimizer in optimizers:
            optimizer.step()
    assert_same(*map(snapshot, optimizers))


def test_empty_parameters_and_parameters_without_a_gradient():
    weights = [parameter(0, 5000), parameter(64, 64), parameter(64, 64)]
    optimizer = RoutedAdamW(weights, state_dtype="8bit", block_dim=1)
    for weight in weights[:2]:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weights[2] not in optimizer.state
    assert optimizer.state[weights[0]]["exp_avg"].shape == (0, 5000)


@pytest.mark.parametrize("block_dim", [0, 1, None])
def test_no_value_is_read_on_the_host(block_dim, monkeypatch):
    from gradroute.optim import arithmetic

    monkeypatch.setattr(arithmetic, "is_on_the_host", lambda tensor: False)
    optimizer = quantised_optimizer(
        (64, 64), (32, 160), block_dim=block_dim, lr=torch.tensor(0.1), amsgrad=True
    )
    fill_gradients(optimizer)
    before = [p.detach().clone() for p in parameters_of(optimizer)]
    with NoWaiting():
        optimizer.step()
        optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(parameters_of(optimizer), before, strict=True))


def test_on_the_meta_device_only_shapes_are_made():
    weight = nn.Parameter(torch.empty(64, 96, device="meta"))
    weight.grad = torch.empty_like(weight)
    optimizer = RoutedAdamW([weight], block_dim=1, state_dtype="8bit")
    optimizer.step()
    assert optimizer.state[weight]["exp_avg_scales"].shape == (1, 96)
    saved = quantised_optimizer((64, 96), block_dim=1)
    fill_gradients(saved)
    saved.step()
    optimizer.load_state_dict(saved.state_dict())
    assert {value.device.type for value in optimizer.state[weight].values()} == {"meta"}


def test_in_a_fake_mode_only_shapes_are_made(monkeypatch):
    monkeypatch.setattr(quantised, "_MAPS", {})
    with torch._subclasses.FakeTensorMode():
        weight = nn.Parameter(torch.empty(64, 96))
        weight.grad = torch.empty_like(weight)
        optimizer = RoutedAdamW([weight], state_dtype="8bit")
        optimizer.step()
        assert optimizer.state[weight]["exp_avg_codes"].shape == (64, 96)
    assert all(not isinstance(table, torch._subclasses.FakeTensor) for table in quantised._MAPS.values())


def test_a_default_device_without_values_does_not_matter(monkeypatch):
    monkeypatch.setattr(quantised, "_MAPS", {})
    weight = parameter(64, 96)
    with torch.device("meta"):
        optimizer = RoutedAdamW([weight], state_dtype="8bit")
    fill_gradients(optimizer)
    optimizer.step()
    assert (values_of(optimizer, weight, "exp_avg_sq") > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("fused", FUSED)
def test_a_compiled_step(fused):
    """A step compiles whole, without a break, and keeps what is not touched."""
    optimizer = quantised_optimizer((64, 80), (4,), lr=torch.tensor(0.1), fused=fused)
    fill_gradients(optimizer)
    optimizer.step()
    other = copy.deepcopy(optimizer)
    torch._dynamo.reset()
    compiled = torch.compile(other.step, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        fill_gradients(optimizer, other)
        for one in (optimizer, other):
            parameters_of(one)[0].grad[1] = 0
        before = snapshot(other)[0]
        optimizer.step()
        compiled()
        after = snapshot(other)[0]
        assert same(after[0][1], before[0][1])
        assert all(same(value[1], before[1][name][1]) for name, value in after[1].items())
    for (got, state), (want, expected) in zip(snapshot(other), snapshot(optimizer), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        for name, value in state.items():
            if name.endswith("_codes"):  # a sum rounded otherwise may cross the middle between two codes
                assert (value != expected[name]).float().mean() < 1e-2
            else:
                torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("change", ["ablate", "contract"])
def test_era_changes_no_codes(change):
    """Code 0 of the first moment stands for -0.993 of the scale, so nothing may write it."""
    from gradroute import RoutedMLP

    model = RoutedMLP(64, 96)
    optimizer = RoutedAdamW(model.parameters(), state_dtype="8bit")
    fill_gradients(optimizer)
    optimizer.step()
    before = snapshot(optimizer)
    block = Block.units(model, [3, 4])
    with pytest.raises(
        TypeError, match=r"optimizer: got state 'exp_avg_codes' of .* the codes of quantised moments"
    ):
        gradroute.era.ablate(model, block, "zero" if change == "ablate" else "slice", optimizer=optimizer)
    assert_same(snapshot(optimizer), before)
