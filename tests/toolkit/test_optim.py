"""RoutedAdamW: torch's AdamW where everything is touched, nothing at all where nothing is; every refusal."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_cases import (
    MOMENTS,
    assert_same,
    both_optimizers,
    equal,
    fill_gradients,
    gradient_of,
    parameter,
    parameters_of,
    same,
    same_numbers,
    snapshot,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradroute.blocks import Block
from gradroute.optim import RoutedAdamW, arithmetic

HYPERPARAMETERS = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 1e-3, 0.037, 1.0]),
        "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.99), (0.5, 0.9), (0.49, 0.0), (0.87, 0.9999)]),
        "eps": st.sampled_from([1e-8, 0.0, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 0.01, 0.3]),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
    }
)


SHAPES = st.lists(st.integers(1, 19), min_size=0, max_size=3)


@settings(max_examples=120)
@given(
    SHAPES,
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.sampled_from([0, 1, None]),
    st.booleans(),
    HYPERPARAMETERS,
)
def test_it_is_torchs_where_every_block_is_touched(shape, dtype, block_dim, tensor_lr, options):
    if len(shape) < 2 and block_dim == 1:
        block_dim = 0
    ours = parameter(*shape, dtype=dtype)
    theirs = copy.deepcopy(ours)
    lr = torch.tensor(options.pop("lr")) if tensor_lr else options.pop("lr")
    routed = RoutedAdamW([ours], lr, block_dim=block_dim, **options)
    torchs = torch.optim.AdamW([theirs], lr, foreach=False, **options)
    for step in range(6):
        ours.grad = gradient_of(shape, dtype)
        theirs.grad = ours.grad.clone()
        routed.step()
        torchs.step()
        assert same_numbers(ours, theirs), step
    for name in MOMENTS[: 3 if options["amsgrad"] else 2]:
        assert same_numbers(routed.state[ours][name], torchs.state[theirs][name]), name
    assert (routed.state[ours]["step"] == 6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bias_corrections_are_pythons_after_many_steps(dtype):
    """torch's own power of fp64 differs from Python's, which torch's AdamW takes, in one of fifty counts."""
    ours = parameter(40, 3, dtype=dtype)
    theirs = copy.deepcopy(ours)
    routed = RoutedAdamW([ours], betas=(0.99, 0.999))
    torchs = torch.optim.AdamW([theirs], betas=(0.99, 0.999), foreach=False)
    for _ in range(300):
        ours.grad = gradient_of((40, 3), dtype)
        theirs.grad = ours.grad.clone()
        routed.step()
        torchs.step()
        assert same(ours, theirs)


@pytest.mark.parametrize("stored", [lambda t: t.t(), lambda t: t[:, ::2], lambda t: t.permute(1, 0)])
def test_parameters_may_lie_in_memory_as_they_like(stored):
    whole = torch.randn(6, 10)
    ours, theirs = (nn.Parameter(stored(whole.clone())) for _ in range(2))
    assert not ours.is_contiguous()
    routed, torchs = RoutedAdamW([ours]), torch.optim.AdamW([theirs], foreach=False)
    for _ in range(3):
        ours.grad = gradient_of(ours.shape, ours.dtype)
        theirs.grad = ours.grad.clone()
        routed.step()
        torchs.step()
    assert same(ours, theirs)


def test_groups_and_schedulers():
    ours, theirs = both_optimizers()
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5) for optimizer in (ours, theirs)]
    for _ in range(5):
        fill_gradients(ours, theirs)
        ours.step()
        theirs.step()
        for scheduler in schedulers:
            scheduler.step()
    assert ours.param_groups[0]["lr"] != 1e-3
    assert all(map(same, parameters_of(ours), parameters_of(theirs)))


def test_closures():
    weight = parameter(3)
    optimizer = RoutedAdamW([weight])

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    assert optimizer.step() is None


def test_a_parameter_without_a_gradient_is_left_out():
    with_one, without = parameter(3, 2), parameter(3, 2)
    before = without.detach().clone()
    with_one.grad = torch.ones(3, 2)
    optimizer = RoutedAdamW([with_one, without])
    optimizer.step()
    assert same(without, before)
    assert without not in optimizer.state
    RoutedAdamW([without]).step()


def blocks_of(tensor, block_dim):
    """The views of a tensor's blocks."""
    if block_dim is None or tensor.dim() == 0:
        return [tensor]
    return [tensor.select(block_dim, index) for index in range(tensor.shape[block_dim])]


@settings(max_examples=80)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from([0, 1, None]),
    HYPERPARAMETERS,
    st.floats(0, 1),
)
def test_every_block_has_an_adamw_of_its_own(shape, dtype, block_dim, options, share):
    """A step is that of one torch.optim.AdamW a block, which steps only when its gradient is not 0."""
    if len(shape) < 2 and block_dim == 1:
        block_dim = 0
    weight = parameter(*shape, dtype=dtype)
    # A block of a parameter is touched, but elements of it may still be 0.
    alone = [nn.Parameter(block.detach().clone()) for block in blocks_of(weight, block_dim)]
    routed = RoutedAdamW([weight], block_dim=block_dim, **options)
    own = [torch.optim.AdamW([one], foreach=False, **options) for one in alone]
    steps = [0] * len(alone)
    for _ in range(7):
        weight.grad = gradient_of(shape, dtype, touched=torch.rand(shape) < share)
        for index, gradient in enumerate(blocks_of(weight.grad, block_dim)):
            if (gradient != 0).any():
                alone[index].grad = gradient.clone()
                own[index].step()
                steps[index] += 1
        routed.step()
        for index, block in enumerate(blocks_of(weight, block_dim)):
            assert equal(block, alone[index])
    state = routed.state[weight]
    assert torch.broadcast_shapes(state["step"].shape, weight.shape) == weight.shape
    assert state["step"].flatten().tolist() == steps
    for name in MOMENTS[: 3 if options["amsgrad"] else 2]:
        for one, optimizer, block in zip(alone, own, blocks_of(state[name], block_dim), strict=True):
            expected = optimizer.state[one][name] if one in optimizer.state else torch.zeros_like(one)
            assert equal(block, expected), name


@pytest.mark.parametrize("block_dim", [0, 1])
def test_a_block_of_the_optimizer_is_a_block_of_the_model(block_dim):
    """A gradient in one element moves exactly what `gradroute.blocks` calls a block of one row or column."""
    model = nn.Linear(4, 3, bias=False)
    optimizer = RoutedAdamW(model.parameters(), lr=0.1, block_dim=block_dim)
    before = model.weight.detach().clone()
    model.weight.grad = torch.zeros_like(before)
    model.weight.grad[2, 1] = 1.0
    optimizer.step()
    block = Block.of(model, {"weight": (block_dim, [(2, 1)[block_dim]])})
    assert torch.equal(model.weight != before, block.masks(model)["weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.5, 0.9)])
def test_untouched_blocks_keep_every_bit(dtype, betas):
    """Any bits are kept: zeros of both signs, infinities, NaN, numbers without a normal exponent."""
    tiny = torch.finfo(dtype).smallest_normal
    strange = [0.0, -0.0, math.inf, -math.inf, math.nan, tiny / 4, -tiny / 4, 1.0]
    weight = nn.Parameter(torch.tensor([strange] * 3, dtype=dtype))
    optimizer = RoutedAdamW([weight], 0.1, betas, eps=0.0, weight_decay=0.1, amsgrad=True)
    weight.grad = torch.zeros(3, 8, dtype=dtype)
    optimizer.step()
    state = optimizer.state[weight]
    state["exp_avg"].copy_(weight.detach())
    state["exp_avg_sq"].copy_(weight.detach().abs())
    state["max_exp_avg_sq"].copy_(weight.detach().abs())
    before = snapshot(optimizer)
    weight.grad = gradient_of((3, 8), dtype, touched=False)
    optimizer.step()
    assert_same(snapshot(optimizer), before)
    weight.grad[1] = 1
    optimizer.step()
    assert state["step"].flatten().tolist() == [0, 1, 0]
    assert not same(weight[1], before[0][0][1])
    for row in (0, 2):
        assert same(weight[row], before[0][0][row])
        assert all(same(state[name][row], before[0][1][name][row]) for name in MOMENTS)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e-30])
@pytest.mark.parametrize("block_dim", [0, 1, None])
def test_what_is_not_zero_touches(value, block_dim):
    weight = parameter(3, 3)
    weight.grad = torch.zeros(3, 3)
    weight.grad[1, 1] = value
    optimizer = RoutedAdamW([weight], block_dim=block_dim)
    optimizer.step()
    steps = optimizer.state[weight]["step"]
    assert steps.flatten().tolist() == ([0, 1, 0] if block_dim is not None else [1])


@pytest.mark.parametrize(
    ("shape", "block_dim", "steps"),
    [
        ((4, 3), 0, (4, 1)),
        ((4, 3), 1, (1, 3)),
        ((4, 3), None, ()),
        ((4, 3, 2), 0, (4, 1, 1)),
        ((4, 3, 2), 1, (1, 3, 1)),
        ((4,), 0, (4,)),
        ((4,), None, ()),
        ((), 0, ()),
        ((0, 3), 0, (0, 1)),
        ((0, 3), 1, (1, 3)),
    ],
)
def test_state(shape, block_dim, steps):
    weight = parameter(*shape, dtype=torch.bfloat16)
    weight.grad = torch.ones_like(weight)
    optimizer = RoutedAdamW([weight], block_dim=block_dim, amsgrad=True)
    optimizer.step()
    state = optimizer.state[weight]
    assert set(state) == {"step", *MOMENTS}
    assert state["step"].shape == steps
    assert state["step"].dtype == torch.float32
    assert all(state[name].shape == shape and state[name].dtype == torch.bfloat16 for name in MOMENTS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr: got -1.0, expected a finite number of 0 or more"),
        ({"lr": math.nan}, ValueError, "lr: got nan"),
        ({"lr": torch.ones(2)}, ValueError, r"lr: got a tensor of shape \[2\], expected one element"),
        ({"eps": -1.0}, ValueError, "eps: got -1.0"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay: got -1.0"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas: got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, ValueError, r"betas: got \(0.9,\)"),
        ({"block_dim": 2}, ValueError, "block_dim: got 2, expected 0, 1 or None"),
        ({"block_dim": True}, TypeError, "block_dim: got True"),
        ({"block_dim": -1}, ValueError, "block_dim: got -1"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        RoutedAdamW([parameter(2, 2)], **options)


def test_groups_are_checked_when_they_are_added():
    optimizer = RoutedAdamW([parameter(2, 2)], block_dim=1)
    message = r"block_dim: got 1 for a parameter of shape \[16\], expected 0 or None: it has no columns"
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [parameter(16)]})
    with pytest.raises(TypeError, match=r"params: got a parameter of torch.complex64 and shape \[2\]"):
        optimizer.add_param_group(
            {"params": nn.Parameter(torch.zeros(2, dtype=torch.complex64)), "block_dim": 0}
        )
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [parameter(16)], "block_dim": 0})
    assert optimizer.param_groups[1]["lr"] == 1e-3


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    optimizer = RoutedAdamW(embedding.parameters())
    for call in (optimizer.step, lambda: optimizer.clip_grad_norm_(1.0)):
        with pytest.raises(RuntimeError, match=r"got a sparse gradient for a parameter of shape \[5, 3\]"):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "counts", [[0.0], [3.0] * 7, [0.0, 1.0, 1.0, 3.0, 5.0, 1.0], [0.0, 2.0**22], [9.0, 7.0, 9.0]]
)
def test_corrections_are_those_of_floats(counts, dtype):
    """However counts of steps lie: all alike, near one another or far apart."""
    betas, lr = (0.9, 0.999), 1e-3
    sizes, roots = arithmetic.bias_corrections(torch.tensor(counts, dtype=torch.float32), betas, lr, dtype)
    for count, size, root in zip(counts, sizes, roots, strict=True):
        first, second = (1 - beta**count for beta in betas)
        assert size == torch.tensor(lr / first if first else math.inf, dtype=dtype)
        assert root == torch.tensor(second**0.5, dtype=dtype)


class NoWaiting(TorchDispatchMode):
    """Raises where a tensor's value is read on the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        ), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("block_dim", [0, 1, None])
def test_no_value_is_read_on_the_host(block_dim, monkeypatch):
    """Of a GPU's tensors: those of the CPU stand for them, whose counts of steps are read otherwise."""
    monkeypatch.setattr(arithmetic, "is_on_the_host", lambda tensor: False)
    weights = [parameter(4, 3), parameter(3, 3, dtype=torch.float64)]
    optimizer = RoutedAdamW(weights, torch.tensor(0.1), block_dim=block_dim, amsgrad=True)
    fill_gradients(optimizer)
    with NoWaiting():
        optimizer.step()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)


def test_on_the_meta_device_only_shapes_are_made():
    weight = nn.Parameter(torch.empty(4, 3, device="meta"))
    weight.grad = torch.empty_like(weight)
    optimizer = RoutedAdamW([weight], block_dim=1)
    optimizer.step()
    assert optimizer.state[weight]["step"].shape == (1, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_step(dtype):
    """A step compiles whole, without a break. Dynamo decomposes addcmul, which then rounds once more."""
    ours, theirs = parameter(5, 3, dtype=dtype), parameter(4, dtype=dtype)
    optimizer = RoutedAdamW([ours, theirs], torch.tensor(0.1))
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
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(state, expected)
    assert optimizer.state[ours]["step"].flatten().tolist() == [3, 1, 3, 3, 3]


def test_grad_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weight = parameter(3, 2)
    expected = copy.deepcopy(weight)
    optimizer, torchs = RoutedAdamW([weight]), torch.optim.AdamW([expected], foreach=False)
    x = torch.randn(2)
    for factor in (1.0, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((weight[:2] @ x).sum() * factor).backward()
        scaler.unscale_(optimizer)
        if factor == 1.0:
            expected.grad = weight.grad.clone()
            torchs.step()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 512.0
    assert optimizer.state[weight]["step"].flatten().tolist() == [2, 2, 0]
    assert same(weight[:2], expected[:2])
