"""RoutedAdamW: torch's AdamW where everything is touched, nothing at all where nothing is; the blocks of a model."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradroute import (
    AttentionSites,
    EmbeddingSites,
    LinearSites,
    MLPSites,
    RoutedAttention,
    RoutedEmbedding,
    RoutedGatedMLP,
    RoutedLayerNorm,
    RoutedLinear,
    RoutedMLP,
    Routes,
)
from gradroute.optim import RoutedAdamW, routed_param_groups
from gradroute.tables import localize

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
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


# Where every block is touched


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


# Where some are not


def blocks_of(tensor, block_dim):
    """Views of every block."""
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
    """Against one torch.optim.AdamW a block, which steps only when its gradient is not 0."""
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.5, 0.9)])
def test_untouched_blocks_keep_every_bit(dtype, betas):
    """Whatever is in them: zeros of both signs, infinities, NaN, numbers without a normal exponent."""
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


# A routed model


@pytest.fixture
def llama():
    pytest.importorskip("transformers")
    import tiny_models

    return tiny_models


def forget_part(name, tensor, tiny, heads=2, units=8):
    """The part of a parameter of a tiny Llama that belongs to the last heads and hidden units; None: nothing."""
    key_rows = heads // (tiny.HEADS // tiny.KV_HEADS) * tiny.HEAD_DIM
    rows = {"q_proj": heads * tiny.HEAD_DIM, "k_proj": key_rows, "v_proj": key_rows}
    rows |= {"gate_proj": units, "up_proj": units}
    columns = {"o_proj": heads * tiny.HEAD_DIM, "down_proj": units}
    layer = name.split(".")[-2]
    if layer in rows:
        return tensor[-rows[layer] :]
    return tensor[:, -columns[layer] :] if layer in columns else None


def train(model, optimizer, tiny, route, steps=3):
    for seed in range(steps):
        tokens = tiny.tokens(seed=seed)
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens, route_ids=torch.full_like(tokens, route)).loss.backward()
        optimizer.step()


def confined(model, tiny):
    parts = {name: forget_part(name, p, tiny) for name, p in model.named_parameters()}
    return {name: part.detach().clone() for name, part in parts.items() if part is not None}


@pytest.mark.parametrize("what", ["moments", "decay"])
def test_adamw_leaks_and_routed_adamw_does_not(llama, what):
    """Retain steps after forget steps: AdamW moves the forget part by its moments alone, and by decay alone."""
    from gradroute.models import route, sgtm

    base = llama.llama()
    route(base, sgtm(base.config, forget_heads=2, forget_units=8))
    options = {"weight_decay": 0.1 if what == "decay" else 0.0}
    for kind in (torch.optim.AdamW, RoutedAdamW):
        model = copy.deepcopy(base)
        if kind is RoutedAdamW:
            optimizer = RoutedAdamW(routed_param_groups(model), 1e-2, **options)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), 1e-2, **options)
        if what == "moments":
            train(model, optimizer, llama, route=1)
        before = confined(model, llama)
        states = {
            name: [forget_part(name, optimizer.state[p][moment], llama).clone() for moment in MOMENTS[:2]]
            for name, p in model.named_parameters()
            if name in before and optimizer.state
        }
        train(model, optimizer, llama, route=0)
        after = confined(model, llama)
        assert len(after) == 7 * llama.LAYERS
        for name, part in after.items():
            if kind is RoutedAdamW:
                assert same(part, before[name]), name
            else:
                assert (part != before[name]).float().mean() > 0.99, name
        for name, p in model.named_parameters():
            if kind is RoutedAdamW and name in before:
                state = optimizer.state[p]
                steps = forget_part(name, state["step"].expand_as(p), llama)
                assert (steps == (3 if what == "moments" else 0)).all()
                assert (state["step"] >= 3).any()
                for moment, kept in zip(MOMENTS, states.get(name, []), strict=False):
                    assert same(forget_part(name, state[moment], llama), kept)


def test_negative_weights_touch():
    """They unlearn (ERA's negative learning rate), so they are gradients like any other."""
    table = localize(2, 6, {1: slice(4, 6)}, off=-0.75)
    layer = RoutedLinear(3, 6, sites=LinearSites(update_rows=table))
    optimizer = RoutedAdamW(routed_param_groups(layer), weight_decay=0.0)
    before = layer.weight.detach().clone()
    routes = Routes.of(torch.ones(5, dtype=torch.long), 2)
    layer(torch.randn(5, 3), routes).sum().backward()
    reversed_gradient = layer.weight.grad.sign()
    optimizer.step()
    assert optimizer.state[layer.weight]["step"].flatten().tolist() == [1] * 6
    assert torch.equal((before - layer.weight.detach()).sign(), reversed_gradient)


# Clipping


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
    )  # torch's touches every row by NaN
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


# State that is saved


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
        # The steps fit, of rows as many as before.
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


# What is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr: got -1.0, expected 0 or more"),
        ({"lr": math.nan}, ValueError, "lr: got nan"),
        ({"lr": torch.ones(2)}, ValueError, r"lr: got a tensor of shape \[2\], expected one element"),
        ({"eps": -1.0}, ValueError, "eps: got -1.0"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay: got -1.0"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas: got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, ValueError, r"betas: got \(0.9,\)"),
        ({"block_dim": 2}, ValueError, "block_dim: got 2, expected 0, 1 or None"),
        ({"block_dim": True}, ValueError, "block_dim: got True"),
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


# Nothing waits for the device


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
def test_no_value_is_read_on_the_host(block_dim):
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
    """Whole, without a break. Dynamo decomposes addcmul, which then rounds once more, and no two ways cancel."""
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


# The blocks of a model


def block_dims(model, **options):
    """By the name of a parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = routed_param_groups(model, **options)
    found = [(names[id(p)], group["block_dim"]) for group in groups for p in group["params"]]
    assert len(found) == len(dict(found))
    assert set(dict(found)) == {name for name, p in model.named_parameters() if p.requires_grad}
    return dict(found)


UNITS = localize(2, 8, {1: slice(6, 8)})
WIDTH = localize(2, 6, {1: slice(0, 1)})
ALL = [[1.0], [0.0]]


@pytest.mark.parametrize(
    ("sites", "outer"),
    [
        (None, 0),
        (MLPSites(hidden=UNITS), 0),
        (MLPSites(pre=UNITS, update_in=UNITS), 0),
        (MLPSites(update=UNITS), 1),
        (MLPSites(update_out=UNITS), 1),
        (MLPSites(forward=localize(2, 8, {0: slice(0, 6)})), 1),
        (MLPSites(output=WIDTH), 0),
        (MLPSites(update=ALL), 0),
        (MLPSites(update_out=UNITS, output=WIDTH), 0),  # 6 of 8 against 5 of 6
        (MLPSites(update_out=UNITS, output=localize(2, 6, {1: slice(0, 3)})), 1),
        (MLPSites(update=localize(2, 8, {1: slice(6, 8)}, off=-0.75)), 0),
    ],
)
@pytest.mark.parametrize("kind", [RoutedMLP, RoutedGatedMLP])
def test_blocks_of_mlps(kind, sites, outer):
    found = block_dims(kind(6, 8, sites=sites))
    *_, last = kind.names
    assert found.pop(f"{last}.weight") == outer
    assert set(found.values()) == {0}


@pytest.mark.parametrize(
    ("sites", "output"),
    [
        (None, 0),
        (AttentionSites(heads=localize(2, 4, {1: [3]}), query=localize(2, 4, {1: [3]})), 0),
        (AttentionSites(update_q=localize(2, 4, {1: [3]}), update_kv=localize(2, 2, {1: [1]})), 0),
        (AttentionSites(update=localize(2, 4, {1: [3]}), update_kv=localize(2, 2, {1: [1]})), 1),
        (AttentionSites(update_out=localize(2, 4, {1: [3]})), 1),
        (AttentionSites(forward_heads=localize(2, 4, {0: [0, 1, 2]})), 1),
    ],
)
def test_blocks_of_attention(sites, output):
    found = block_dims(RoutedAttention(12, 4, 2, sites=sites, bias=True))
    assert found.pop("o_proj.weight") == output
    assert set(found.values()) == {0}


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        (LinearSites(output=WIDTH), 0),
        (LinearSites(update_rows=WIDTH), 0),
        (LinearSites(input=UNITS), 0),
        (LinearSites(update_cols=UNITS), 1),
        (LinearSites(update_rows=ALL, update_cols=UNITS), 1),
        (LinearSites(update_rows=WIDTH, update_cols=UNITS), 0),
        (LinearSites(output=ALL, update_cols=ALL), 0),
    ],
)
def test_blocks_of_linear_layers(sites, expected):
    assert block_dims(RoutedLinear(8, 6, sites=sites)) == {"weight": expected, "bias": 0}


def test_blocks_of_the_rest():
    model = nn.ModuleDict(
        {
            "tokens": RoutedEmbedding(9, 6, sites=EmbeddingSites(ALL)),
            "features": RoutedEmbedding(9, 6, sites=EmbeddingSites(WIDTH)),
            "norm": RoutedLayerNorm(6),
            "plain": nn.Linear(6, 8),
            "convolution": nn.Conv1d(6, 8, 3),
            "frozen": RoutedLinear(8, 6, sites=LinearSites(update_cols=UNITS)).requires_grad_(False),
        }
    )
    found = block_dims(model)
    assert found.pop("features.weight") == 1
    assert set(found.values()) == {0}
    assert not any(name.startswith("frozen") for name in found)


@pytest.mark.parametrize(
    ("embedding", "head", "expected"),
    [
        (WIDTH, {"update_cols": WIDTH}, 1),
        (WIDTH, {"update_rows": localize(2, 9, {1: slice(3)})}, 0),
        (
            WIDTH,
            {"update_cols": localize(2, 6, {1: slice(1, 6)})},
            0,
        ),  # none of them masks what the other does
        (WIDTH, None, 0),
    ],
)
def test_a_tied_parameter_is_masked_where_all_its_layers_mask(embedding, head, expected):
    layers = nn.ModuleList(
        [
            RoutedEmbedding(9, 6, sites=EmbeddingSites(embedding)),
            nn.Linear(6, 9, bias=False)
            if head is None
            else RoutedLinear(6, 9, bias=False, sites=LinearSites(**head)),
        ]
    )
    layers[1].weight = layers[0].weight
    assert list(block_dims(layers).values()) == [expected]


def test_weight_decay_of_groups():
    model = nn.Sequential(RoutedLinear(8, 6, sites=LinearSites(update_cols=UNITS)), nn.LayerNorm(6))
    plain = routed_param_groups(model)
    assert [group["block_dim"] for group in plain] == [1, 0]
    assert all("weight_decay" not in group for group in plain)
    groups = routed_param_groups(model, weight_decay=0.3)
    assert [(g["block_dim"], g["weight_decay"], len(g["params"])) for g in groups] == [
        (1, 0.3, 1),
        (0, 0.0, 3),
    ]
    named = routed_param_groups(model, weight_decay=0.3, no_decay=lambda name, p: name == "0.weight")
    assert [(g["weight_decay"], len(g["params"])) for g in named] == [(0.0, 1), (0.3, 3)]
    optimizer = RoutedAdamW(named, lr=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    with pytest.raises(ValueError, match="no_decay: got a rule beside weight_decay=None"):
        routed_param_groups(model, no_decay=lambda name, p: True)


@pytest.fixture
def zoo():
    pytest.importorskip("transformers")
    import model_zoo

    return model_zoo


FORGET_HEADS, FORGET_UNITS = 2, 16
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "gpt_neo")
ARCHITECTURES += ("gpt_neox", "gpt_neox_serial", "nano_gpt")


def last(features, count):  # [features]
    return torch.arange(features) >= features - count


def forget_masks(zoo, name, model):
    """By parameter that SGTM confines, bool of its shape: what belongs to the forget part, by hand."""
    kind = zoo.KINDS[name]
    key_heads = FORGET_HEADS // (zoo.HEADS // kind.kv_heads)
    query = last(zoo.HEADS, FORGET_HEADS).repeat_interleave(kind.head_dim)
    key = last(kind.kv_heads, key_heads).repeat_interleave(kind.head_dim)
    rows = {"separate": [query, key, key], "fused": [torch.cat((query, key, key))]}
    rows["by_head"] = [last(zoo.HEADS, FORGET_HEADS).repeat_interleave(3 * kind.head_dim)]
    units = last(zoo.HIDDEN, FORGET_UNITS)
    masks = {}
    for i in range(len(model.get_submodule(kind.layers))):
        layer = f"{kind.layers}.{i}"
        inner = dict(zip((f"{kind.attention}.{part}" for part in kind.qkv), rows[kind.layout], strict=True))
        inner |= dict.fromkeys(kind.inner, units.repeat(2) if kind.fused_gate else units)
        for path, mask in inner.items():
            linear = model.get_submodule(f"{layer}.{path}")
            masks[f"{layer}.{path}.weight"] = linear_mask(linear, mask[:, None])
            masks[f"{layer}.{path}.bias"] = mask
        for path, mask in ((f"{kind.attention}.{kind.output}", query), (kind.outer, units)):
            linear = model.get_submodule(f"{layer}.{path}")
            masks[f"{layer}.{path}.weight"] = linear_mask(linear, mask[None, :])
    return {path: mask for path, mask in masks.items() if path in dict(model.named_parameters())}


def linear_mask(linear, mask):
    is_transposed = type(linear).__name__ == "Conv1D"
    return (mask.t() if is_transposed else mask).expand(linear.weight.shape)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_keeps_what_a_batch_may_not_train(zoo, name):
    from gradroute.models import NANO_GPT, Shape, route, sgtm

    assert set(ARCHITECTURES) == set(zoo.NAMES)
    model = zoo.fresh(name)
    masks = forget_masks(zoo, name, model)
    nano = name == "nano_gpt"
    config = Shape(2, zoo.WIDTH, zoo.HIDDEN, zoo.HEADS, zoo.HEADS, 8) if nano else model.config
    route(model, sgtm(config, FORGET_HEADS, FORGET_UNITS), architecture=NANO_GPT if nano else None)
    optimizer = RoutedAdamW(routed_param_groups(model), lr=1e-2, weight_decay=0.1)
    parameters = dict(model.named_parameters())
    assert sorted(map(id, parameters_of(optimizer))) == sorted(map(id, parameters.values()))
    tokens = torch.randint(3, zoo.VOCABULARY, (4, 8))
    for ids, trained in (([0, 1, 0, 1], None), ([0, 0, 0, 0], False), ([1, 1, 1, 1], True)):
        before = {path: parameters[path].detach().clone() for path in masks}
        states = {path: copy.deepcopy(optimizer.state[parameters[path]]) for path in masks}
        route_ids = torch.tensor(ids)[:, None].expand(4, 8)
        zoo.backward(model, tokens, tokens.roll(-1, 1), route_ids=route_ids)
        optimizer.step()
        for path, mask in masks.items():
            if trained is None:
                continue
            kept, moved = (mask, ~mask) if trained is False else (~mask, mask)
            p, state = parameters[path], optimizer.state[parameters[path]]
            assert same(p[kept], before[path][kept]), path
            assert (p[moved] != before[path][moved]).float().mean() > 0.6, path
            for key, value in state.items():
                old = states[path][key].expand_as(p)
                assert same(value.expand_as(p)[kept], old[kept]), (path, key)
            if p.dim() > 1:  # of a key's bias the gradient is 0, and rounding alone says whether it is one
                assert (state["step"] - states[path]["step"]).expand_as(p)[moved].unique().tolist() == [1]


def test_transposed_weights_have_transposed_blocks(zoo):
    from gradroute.models import route, sgtm

    model = zoo.fresh("gpt2")
    assert set(block_dims(model).values()) == {0, 1}
    route(model, sgtm(model.config, FORGET_HEADS, FORGET_UNITS))
    found = block_dims(model)
    layer = "transformer.h.1."
    assert {name: found[f"{layer}{name}.weight"] for name in ("attn.c_attn", "mlp.c_fc")} == {
        "attn.c_attn": 1,
        "mlp.c_fc": 1,
    }
    assert {name: found[f"{layer}{name}.weight"] for name in ("attn.c_proj", "mlp.c_proj")} == {
        "attn.c_proj": 0,
        "mlp.c_proj": 0,
    }


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters(llama):
    """A by columns and B by rows, which is what masks of hidden units and heads leave of them."""
    peft = pytest.importorskip("peft")
    from gradroute.models import route, sgtm

    linears = ["q_proj", "o_proj", "gate_proj", "down_proj", "embed_tokens"]
    config = peft.LoraConfig(target_modules=linears, r=3, init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama.llama(), config)
    base = model.get_base_model()
    route(model, sgtm(base.config, 2, 8))
    found = block_dims(model)
    assert len(found) == 2 * (4 * llama.LAYERS + 1)
    assert all(dim == (1 if "lora_A" in name or "embedding_A" in name else 0) for name, dim in found.items())
    optimizer = RoutedAdamW(routed_param_groups(model), lr=1e-2)
    train(model, optimizer, llama, route=1, steps=1)
    layer = base.model.layers[1]
    kept = {
        "gate": layer.mlp.gate_proj.lora_B["default"].weight[-8:],
        "down": layer.mlp.down_proj.lora_A["default"].weight[:, -8:],
        "q": layer.self_attn.q_proj.lora_B["default"].weight[-2 * llama.HEAD_DIM :],
        "o": layer.self_attn.o_proj.lora_A["default"].weight[:, -2 * llama.HEAD_DIM :],
    }
    before = {name: part.detach().clone() for name, part in kept.items()}
    train(model, optimizer, llama, route=0, steps=2)
    assert all(same(kept[name], before[name]) for name in kept)
    train(model, optimizer, llama, route=1, steps=1)
    assert not any(same(kept[name], before[name]) for name in kept)
