"""Routes: what they accept, every refusal with its message, what they derive, and how they follow tokens."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from device_state import without_waiting

from gradroute import LinearSites, Routes, Table, routed_linear
from gradroute.routes import MAX_ROUTES

INTEGER_DTYPES = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
)


def expect(error, message):
    return pytest.raises(error, match=re.escape(message))


# Accepted


@pytest.mark.parametrize("dtype", INTEGER_DTYPES)
def test_any_integer_dtype(dtype, device):
    ids = torch.tensor([[2, 0, 1], [1, 1, 0]]).to(device=device, dtype=dtype)
    routes = Routes.of(ids, 3)
    assert routes.ids.dtype == torch.int32
    assert routes.ids.is_contiguous()
    assert routes.ids.tolist() == [2, 0, 1, 1, 1, 0]
    assert routes.shape == (2, 3)
    assert routes.device == ids.device


def test_bool_ids():
    routes = Routes.of(torch.tensor([True, False, True]), 2)
    assert routes.ids.tolist() == [1, 0, 1]


@pytest.mark.parametrize("ids", [[0, 1, 1], (0, 1, 1), np.array([0, 1, 1], dtype=np.int16)])
def test_ids_from_python_and_numpy(ids):
    assert Routes.of(ids, 2).ids.tolist() == [0, 1, 1]


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_zero_tokens(shape):
    routes = Routes.of(torch.zeros(shape, dtype=torch.int64), 3, strength=torch.zeros(shape))
    assert len(routes) == 0
    assert routes.shape == shape
    assert routes.order.tolist() == []
    assert routes.counts.tolist() == [0, 0, 0]
    assert routes.host_counts == (0, 0, 0)


def test_strided_ids_and_strength():
    ids, strength = torch.arange(12).view(3, 4).T % 3, torch.rand(3, 4).T
    routes = Routes.of(ids, 3, strength=strength)
    assert routes.ids.tolist() == ids.flatten().tolist()
    assert torch.equal(routes.strength, strength.flatten())


def test_host_counts_only_where_ids_came_from_the_host():
    meta = Routes.of(torch.zeros(4, dtype=torch.int64, device="meta"), 2)
    assert meta.host_counts is None
    assert meta.counts.shape == (2,)


@pytest.mark.gpu
def test_host_counts_of_ids_on_the_gpu():
    ids = torch.tensor([0, 1, 1])
    assert Routes.of(ids.cuda(), 2).host_counts is None
    assert Routes.of(ids, 2).to("cuda").host_counts == (1, 2)


@pytest.mark.gpu
def test_only_validation_waits_for_the_gpu():
    ids, strength = torch.tensor([0, 1, 1], device="cuda"), torch.rand(3, device="cuda")
    with without_waiting():
        routes = Routes.of(ids, 2, strength=strength, validate=False)
    assert routes.counts.tolist() == [1, 2]


@pytest.mark.parametrize("strength", [0.5, 1, torch.tensor(0.5, dtype=torch.bfloat16), torch.rand(3)])
def test_strength_is_kept_in_fp32(strength):
    routes = Routes.of([0, 1, 0], 2, strength=strength)
    assert routes.strength.dtype == torch.float32
    assert torch.equal(routes.strength, torch.as_tensor(strength).float())


def test_strength_in_fp64_stays_so():
    assert Routes.of([0, 1], 2, strength=torch.rand(2, dtype=torch.float64)).strength.dtype == torch.float64


def test_a_strength_written_later_counts():
    """A 0-dim fp32 strength is kept, not copied: annealing needs no new Routes."""
    strength = torch.tensor(0.0)
    routes = Routes.of([1], 2, strength=strength)
    x = torch.ones(1, 1, requires_grad=True)
    sites, weight = LinearSites(output=[[1.0], [0.25]]), torch.ones(1, 1)
    gradients = []
    for value in (0.0, 1.0):
        strength.fill_(value)
        gradients += torch.autograd.grad(routed_linear(x, weight, None, routes, sites).sum(), x)
    assert [float(g) for g in gradients] == [1.0, 0.25]


# Refused: the message names the argument, what it got and what was expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_float_ids(dtype):
    with expect(TypeError, f"ids: got dtype {dtype}, expected an integer or bool dtype"):
        Routes.of(torch.zeros(3, dtype=dtype), 2)


def test_ids_out_of_range():
    ids = torch.tensor([[0, 1, 4], [-1, 9, 4]])
    with expect(
        ValueError,
        "ids: got 4 of 6 out of range, the first at [0, 2], values -1, 4, 9; expected 0 <= id < num_routes = 4",
    ):
        Routes.of(ids, 4)


def test_many_ids_out_of_range_are_abbreviated():
    with expect(
        ValueError, "got 7 of 10 out of range, the first at [3], values 3, 4, 5, 6, 7, ...; expected"
    ):
        Routes.of(torch.arange(10), 3)


def test_unvalidated_ids_are_not_read():
    assert Routes.of(torch.tensor([0, 7]), 2, validate=False).ids.tolist() == [0, 7]


@pytest.mark.parametrize("num_routes", [0, -1, MAX_ROUTES + 1])
def test_num_routes_out_of_range(num_routes):
    with expect(ValueError, f"num_routes: got {num_routes}, expected an int from 1 to {MAX_ROUTES}"):
        Routes.of([0], num_routes)


@pytest.mark.parametrize("num_routes", [2.0, True, "2", None])
def test_num_routes_is_not_an_int(num_routes):
    with expect(TypeError, f"num_routes: got {num_routes!r}, expected an int"):
        Routes.of([0], num_routes)


def test_the_most_routes():
    routes = Routes.of([0, MAX_ROUTES - 1], MAX_ROUTES)
    assert routes.ids.tolist() == [0, MAX_ROUTES - 1]


def test_strength_of_another_shape():
    with expect(ValueError, "strength: got shape [6], expected the ids' [2, 3] or 0-dim"):
        Routes.of(torch.zeros(2, 3, dtype=torch.int64), 2, strength=torch.ones(6))


def test_strength_of_integers():
    with expect(TypeError, "strength: got dtype torch.int64, expected floating point"):
        Routes.of([0, 0], 2, strength=torch.ones(2, dtype=torch.int64))


def test_strength_that_is_not_finite():
    strength = torch.tensor([[1.0, 0.5], [torch.inf, torch.nan]])
    with expect(
        ValueError,
        "strength: got 2 of 4 values that are not finite, the first at [1, 0]; expected finite numbers",
    ):
        Routes.of(torch.zeros(2, 2, dtype=torch.int64), 2, strength=strength)


def test_a_single_strength_that_is_not_finite():
    with expect(ValueError, "strength: got 1 of 1 values that are not finite"):
        Routes.of([0], 2, strength=torch.nan)


def test_strength_on_another_device():
    with expect(ValueError, "strength: got a tensor on meta, expected the ids' device cpu"):
        Routes.of([0, 1], 2, strength=torch.ones(2, device="meta"))


# Against an activation


@pytest.mark.parametrize("shape", [(2, 3), (6,)])
def test_ids_of_the_activations_shape_or_flat(shape):
    routes = Routes.of(torch.zeros(shape, dtype=torch.int64), 2)
    routes.check(torch.empty(2, 3, 5), "x")
    assert routes.shape == shape


@pytest.mark.parametrize("shape", [(3, 2), (5,), (2, 3, 1), (1, 6)])
def test_ids_of_another_shape_than_the_activations(shape):
    routes = Routes.of(torch.zeros(shape, dtype=torch.int64), 2)
    with expect(
        ValueError,
        f"routes: got ids of shape {list(shape)}, expected x's leading shape [2, 3] or [6] (x is [2, 3, 5])",
    ):
        routes.check(torch.empty(2, 3, 5), "x")


def test_activation_on_another_device():
    routes = Routes.of([0, 1], 2)
    with expect(
        ValueError,
        "routes: got ids on cpu, expected x's device meta; move them once per batch with routes.to('meta')",
    ):
        routes.check(torch.empty(2, 3, device="meta"), "x")


def test_not_routes():
    x = torch.zeros(2, 3)
    with expect(
        TypeError,
        "routes: got a Tensor, expected gradroute.Routes or None; gradroute.Routes.of(ids, num_routes)",
    ):
        routed_linear(x, torch.zeros(4, 3), None, torch.zeros(2, dtype=torch.int64), LinearSites())


# Following the tokens


def routes_of(shape, num_routes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(num_routes, shape, generator=generator)
    strength = torch.rand(shape, generator=generator)
    return ids, strength, Routes.of(ids, num_routes, strength=strength)


def assert_routes(routes, ids, strength):
    """The same Routes as those made afresh."""
    expected = Routes.of(ids, 5, strength=strength)
    assert routes.shape == expected.shape
    assert routes.num_routes == expected.num_routes
    for name in ("ids", "strength", "order", "counts"):
        assert torch.equal(getattr(routes, name).flatten(), getattr(expected, name).flatten()), name
    assert routes.host_counts == expected.host_counts
    assert routes.ids.is_contiguous()


INDICES = [
    0,
    slice(1, 3),
    (slice(None), slice(2, 7)),
    (..., slice(None, None, 2)),
    (1, slice(3)),
    (2, 4),
    torch.tensor([2, 0]),
    (torch.tensor([0, 1]), torch.tensor([5, 6])),
    torch.tensor([True, False, True]),
    None,
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indexing_is_that_of_a_tensor(index):
    ids, strength, routes = routes_of((3, 8))
    assert_routes(routes[index], ids[index], strength[index])


@pytest.mark.parametrize(
    "index", [torch.tensor([5, 0, 23, 5]), torch.arange(24) % 3 == 0, torch.tensor([], dtype=int)]
)
def test_select_is_over_the_flattened_tokens(index):
    ids, strength, routes = routes_of((3, 8))
    assert_routes(routes.select(index), ids.flatten()[index], strength.flatten()[index])


@pytest.mark.parametrize("n", [0, 1, 5])
def test_pad_appends_tokens_of_the_base_route(n):
    ids, strength, routes = routes_of((3, 8))
    padded_ids = torch.cat([ids, torch.zeros(3, n, dtype=ids.dtype)], 1)
    assert_routes(routes.pad(n), padded_ids, torch.cat([strength, torch.ones(3, n)], 1))


def test_pad_keeps_a_single_strength():
    routes = Routes.of([1, 1], 2, strength=0.5).pad(1)
    assert routes.ids.tolist() == [1, 1, 0]
    assert float(routes.strength) == 0.5


def test_pad_by_less_than_nothing():
    with expect(ValueError, "n: got -1, expected an int of 0 or more"):
        Routes.of([0], 1).pad(-1)


@pytest.mark.parametrize("shape", [(-1,), (24,), (2, 12), (2, -1, 3), (8, 3)])
def test_reshape_shares_what_was_derived(shape):
    ids, strength, routes = routes_of((3, 8))
    for reshaped in (routes.reshape(*shape), routes.reshape(shape)):
        assert_routes(reshaped, ids.reshape(shape), strength.reshape(shape))
        assert reshaped.order is routes.order
        assert reshaped.counts is routes.counts


def test_reshape_to_another_number_of_tokens():
    with expect(RuntimeError, "shape '[5]' is invalid for input of size 2"):
        Routes.of([0, 1], 2).reshape(5)


def test_to_the_same_device_is_itself():
    routes = Routes.of([0, 1], 2)
    assert routes.to("cpu") is routes


def test_to_another_device_moves_everything():
    _, _, routes = routes_of((3, 8))
    moved = routes.to("meta")
    assert moved.device.type == "meta"
    assert {name for name, value in vars(moved).items() if torch.is_tensor(value)} == {
        *("ids", "strength", "order", "counts")
    }
    assert all(value.is_meta for value in vars(moved).values() if torch.is_tensor(value))
    assert moved.host_counts == routes.host_counts
    assert moved.shape == routes.shape
    assert routes.device.type == "cpu"


def test_copies_and_pickles():
    ids, strength, routes = routes_of((3, 8))
    for other in (copy.deepcopy(routes), pickle.loads(pickle.dumps(routes)), copy.copy(routes)):
        assert_routes(other, ids, strength)


def test_repr_shows_what_matters():
    routes = Routes.of([[0, 1, 1]], 3, strength=torch.ones(1, 3))
    assert repr(routes) == "Routes([1, 3], num_routes=3, counts=[1, 2, 0], strength=[3], cpu)"


# Sites against routes


def linear(**sites):
    x, weight = torch.zeros(4, 3), torch.zeros(5, 3)
    return routed_linear(x, weight, torch.zeros(5), Routes.of([0, 1, 0, 1], 2), LinearSites(**sites))


def test_rows_are_not_the_routes():
    with expect(ValueError, "LinearSites.output: got a table of 3 routes, expected 2 (routes.num_routes)"):
        linear(output=torch.ones(3, 5))


def test_features_are_not_the_sites():
    with expect(ValueError, "LinearSites.input: got a table of 5 features, expected 3 or 1"):
        linear(input=torch.ones(2, 5))


def test_weights_that_are_not_finite():
    weights = torch.ones(2, 5)
    weights[1, 3] = torch.inf
    with expect(
        ValueError,
        "LinearSites.update_rows: got 1 weights that are not finite in fp32, the first at [1, 3] (inf); "
        "expected finite numbers",
    ):
        linear(update_rows=weights)


def test_unknown_site():
    with expect(
        TypeError,
        "LinearSites: got an unknown site 'hidden', expected one of output, input, update_rows, update_cols, "
        "update_bias",
    ):
        linear(hidden=torch.ones(2, 5))


def test_a_bias_site_without_a_bias():
    sites = LinearSites(update_bias=torch.zeros(2, 5))
    with expect(
        ValueError,
        "LinearSites.update_bias: got Table([2, 5], blocks), expected None: the layer has no bias",
    ):
        routed_linear(torch.zeros(2, 3), torch.zeros(5, 3), None, Routes.of([0, 1], 2), sites)


def test_sites_of_another_op():
    with expect(TypeError, "sites: got a Table, expected gradroute.LinearSites or None"):
        routed_linear(torch.zeros(2, 3), torch.zeros(5, 3), None, Routes.of([0, 1], 2), Table([[1.0], [0.0]]))


def test_the_ids_are_a_copy():
    """Refilling a buffer of ids does not part them from the order and counts derived of them."""
    buffer = torch.tensor([1, 0, 1], dtype=torch.int32)
    routes = Routes.of(buffer, 2)
    buffer.zero_()
    assert routes.ids.tolist() == [1, 0, 1]


@pytest.mark.parametrize("strength", [None, 0.5, [[0.0, 0.25, 1.0], [0.5, 0.75, 1.0]]])
def test_repeat(strength):
    strength = None if strength is None else torch.tensor(strength)
    routes = Routes.of([[0, 1, 2], [2, 0, 1]], 3, strength)
    heads = routes.repeat(2)
    assert heads.shape == (2, 3, 2)
    assert heads.ids.tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 0, 0, 1, 1]
    assert heads.counts.tolist() == [4, 4, 4]
    if strength is None or strength.dim() == 0:
        assert heads.strength is routes.strength
    else:
        assert heads.strength.tolist() == [0, 0, 0.25, 0.25, 1, 1, 0.5, 0.5, 0.75, 0.75, 1, 1]
    assert routes.repeat(2) is heads


def test_ids_and_strengths_that_are_no_numbers_are_named():
    with expect(ValueError, "ids: got [[0, 1], [1]], expected integers in rows of one length"):
        Routes.of([[0, 1], [1]], 2)
    with expect(TypeError, "ids: got 'ab', expected integers"):
        Routes.of("ab", 2)
    with expect(TypeError, "strength: got 'half', expected a number or numbers of the ids' shape"):
        Routes.of([0, 1], 2, strength="half")


def test_routes_on_the_meta_device_do_not_come_back():
    with expect(ValueError, "device: got cpu, expected meta: routes on the meta device have no values"):
        Routes.of([0, 1], 2).to("meta").to("cpu")


def test_a_strength_of_an_array_is_a_copy():
    strength = np.ones(2, dtype=np.float32)
    routes = Routes.of([0, 1], 2, strength=strength)
    strength[:] = 0
    assert routes.strength.tolist() == [1.0, 1.0]
