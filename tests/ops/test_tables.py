"""Tables: conversion, classification, refusals, immutability; localize and heads."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch

from gradroute import LinearSites, MLPSites, Table
from gradroute.tables import MAX_SEGMENTS, concatenate, heads, localize


def expect(error, message):
    return pytest.raises(error, match=re.escape(message))


# Conversion


@pytest.mark.parametrize(
    "weights",
    [
        [[1, 0.5], [0, -0.75]],
        np.array([[1, 0.5], [0, -0.75]]),
        torch.tensor([[1, 0.5], [0, -0.75]], dtype=torch.bfloat16),
        torch.tensor([[1, 0.5], [0, -0.75]], dtype=torch.float64, requires_grad=True),
        torch.tensor([[1, 0], [0.5, -0.75]]).T,
    ],
    ids=["lists", "numpy", "bf16", "fp64", "transposed"],
)
def test_weights_become_fp32_constants_on_the_host(weights):
    table = Table(weights)
    assert table.weights.dtype == torch.float32
    assert table.weights.device.type == "cpu"
    assert table.weights.is_contiguous()
    assert not table.weights.requires_grad
    assert table.weights.tolist() == [[1, 0.5], [0, -0.75]]
    assert (table.num_routes, table.features) == (2, 2)


@pytest.mark.parametrize("weights", [[[True, False]], [[3, -2]]])
def test_bools_and_integers(weights):
    assert Table(weights).weights.tolist() == [[float(value) for value in weights[0]]]


def test_tiny_weights_are_kept():
    assert Table([[1.0], [-5e-8]]).weights[1].item() == pytest.approx(-5e-8, rel=1e-7)


def test_the_source_may_change_afterwards():
    weights = torch.ones(2, 3)
    table = Table(weights)
    weights.zero_()
    assert table.kind == "ones"
    assert (table.weights == 1).all()


def test_of_keeps_a_table():
    table = Table([[1.0]])
    assert Table.of(table) is table
    assert Table(table).weights.tolist() == table.weights.tolist()


# Classification


@pytest.mark.parametrize(
    ("weights", "kind", "segments"),
    [
        ([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], "ones", ()),
        ([[1.0], [1.0]], "ones", ()),
        ([[1.0], [0.0]], "blocks", ((0, 1),)),
        ([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]], "blocks", ((1, 3),)),
        ([[0.5, 0.5, 1.0], [1.0, 1.0, 1.0]], "blocks", ((0, 2),)),
        ([[1.0, 1.0, 0.0, 1.0], [0.5, 0.5, 0.5, 1.0]], "blocks", ((0, 2), (2, 3))),
        ([[0.0] * 4, [0.0] * 4], "blocks", ((0, 4),)),
        (
            [[float(feature % 2) for feature in range(MAX_SEGMENTS)]],
            "blocks",
            tuple((i, i + 1) for i in range(0, 16, 2)),
        ),
        ([[float(feature % 2) for feature in range(MAX_SEGMENTS + 1)]], "dense", ()),
    ],
)
def test_kind_and_segments(weights, kind, segments):
    table = Table(weights)
    assert (table.kind, table.segments) == (kind, segments)


def test_repr():
    assert repr(Table([[1.0, 0.0], [1.0, 0.5]])) == "Table([2, 2], blocks)"


# Refused


@pytest.mark.parametrize(("value", "shown"), [(torch.nan, "nan"), (torch.inf, "inf"), (1e39, "1e+39")])
def test_weights_that_are_not_finite_in_fp32(value, shown):
    weights = torch.ones(3, 4, dtype=torch.float64)
    weights[1, 2] = weights[2, 3] = value
    with expect(
        ValueError,
        f"got 2 weights that are not finite in fp32, the first at [1, 2] ({shown}); expected finite numbers",
    ):
        Table(weights)


@pytest.mark.parametrize("shape", [(3,), (), (2, 3, 4), (0, 3), (3, 0)])
def test_weights_of_another_shape(shape):
    with expect(
        ValueError, f"got weights of shape {list(shape)}, expected [routes, features] or [routes, 1]"
    ):
        Table(torch.ones(shape))


def test_complex_weights():
    with expect(TypeError, "got weights of dtype torch.complex64, expected real numbers"):
        Table(torch.ones(2, 2, dtype=torch.complex64))


def test_weights_without_values():
    with expect(ValueError, "got weights on the meta device, which have no values; expected values"):
        Table(torch.ones(2, 2, device="meta"))


def test_what_is_no_table_at_all():
    with pytest.raises((TypeError, ValueError)):
        Table("ones")


def test_the_message_names_the_site():
    with expect(ValueError, "MLPSites.pre: got weights of shape [3], expected [routes, features]"):
        MLPSites(pre=[1.0, 0.0, 1.0])


@pytest.mark.parametrize("sites", [LinearSites, MLPSites])
def test_an_unknown_site_is_named_with_those_there_are(sites):
    with pytest.raises(
        TypeError, match=rf"{sites.__name__}: got an unknown site 'outptu', expected one of .*output"
    ):
        sites(outptu=[[1.0]])


# Constants


def test_copies_and_pickles():
    table = Table([[1.0, 0.5], [0.0, 1.0]])
    assert copy.deepcopy(table) is table
    assert copy.copy(table).weights.tolist() == table.weights.tolist()
    loaded = pickle.loads(pickle.dumps(table))
    assert loaded.weights.tolist() == table.weights.tolist()
    assert (loaded.kind, loaded.segments) == (table.kind, table.segments)


def test_sites_are_frozen_and_compare_by_identity():
    sites = LinearSites(output=[[1.0], [0.0]])
    with pytest.raises(AttributeError, match="cannot assign to field 'output'"):
        sites.output = None
    assert sites != LinearSites(output=[[1.0], [0.0]])
    assert len({sites, LinearSites(output=[[1.0], [0.0]])}) == 2


def test_sites_survive_deepcopy_and_pickle():
    sites = MLPSites(update=[[1.0], [0.0]], pre=[[1.0, 0.5], [0.0, 1.0]])
    for other in (copy.deepcopy(sites), pickle.loads(pickle.dumps(sites))):
        assert {name: table.weights.tolist() for name, table in other.tables.items()} == {
            name: table.weights.tolist() for name, table in sites.tables.items()
        }
        assert other.effective.update_in.weights.tolist() == [[1.0], [0.0]]


def test_defaults_fill_only_what_is_not_given():
    sites = MLPSites(update=[[1.0], [0.0]], update_in=[[1.0], [0.5]])
    assert sites.update_out is None
    assert sites.effective.update_in.weights.tolist() == [[1.0], [0.5]]
    assert sites.effective.update_out.weights.tolist() == [[1.0], [0.0]]
    assert LinearSites(update_rows=[[0.0]]).effective.update_bias.weights.tolist() == [[0.0]]


def test_a_default_of_ones_is_given_explicitly():
    """update_bias of all ones: every token updates the bias although not every row."""
    sites = LinearSites(update_rows=[[1.0], [0.0]], update_bias=[[1.0], [1.0]])
    assert sites.effective.update_bias is None
    assert sites.effective.update_rows is not None


def test_device_copies_are_made_once(device):
    table = Table([[1.0, 0.5], [0.0, 1.0]])
    copy_of = table.on(device)
    assert table.on(device) is copy_of
    assert copy_of.device.type == device.type
    assert copy_of.tolist() == table.weights.tolist()


def test_an_ambient_device_has_no_part_in_it():
    with torch.device("meta"):
        table, confined = Table([[1.0, 0.5]]), localize(2, 4, {1: slice(2)})
    assert table.weights.tolist() == [[1.0, 0.5]]
    assert confined.weights.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


# localize and heads


@pytest.mark.parametrize(
    "where",
    [slice(1, 3), [1, 2], torch.tensor([1, 2]), np.array([1, 2]), [-3, -2], [False, True, True, False]],
)
def test_localize(where):
    table = localize(3, 4, {1: where}, on=0.5, off=-0.75)
    assert table.weights.tolist() == [[1] * 4, [-0.75, 0.5, 0.5, -0.75], [1] * 4]


def test_localize_confines_several_routes():
    table = localize(2, 3, {0: slice(0, 1), 1: slice(1, None)})
    assert table.weights.tolist() == [[1, 0, 0], [0, 1, 1]]


@pytest.mark.parametrize("route", [-1, 2])
def test_localize_an_unknown_route(route):
    with expect(ValueError, f"where: got route {route}, expected 0 <= route < num_routes = 2"):
        localize(2, 3, {route: slice(1)})


@pytest.mark.parametrize("index", [3, -4])
def test_localize_an_index_out_of_range(index):
    with expect(ValueError, f"where[1]: got index {index}, expected -3 <= index < 3 = features"):
        localize(2, 3, {1: [0, index]})


def test_heads():
    assert heads([[1, 0.5], [0, 1]], 3).weights.tolist() == [[1, 1, 1, 0.5, 0.5, 0.5], [0, 0, 0, 1, 1, 1]]


def test_heads_without_features():
    with expect(ValueError, "head_dim: got 0, expected an int of 1 or more"):
        heads([[1.0]], 0)


def test_concatenate():
    table = concatenate([Table([[1, 0.5], [0, 1]]), None, Table([[0.25], [2]])], [2, 1, 2])
    assert table.weights.tolist() == [[1, 0.5, 1, 0.25, 0.25], [0, 1, 1, 2, 2]]
    assert concatenate([None, None], [2, 1]) is None


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        ([0.5], TypeError, "where[1]: got indices of dtype torch.float64, expected integers"),
        ("ab", TypeError, "where[1]: got 'ab', expected a slice, indices, or a boolean for each feature"),
        ([[1], [1, 2]], ValueError, "where[1]: got [[1], [1, 2]], expected a slice, indices"),
        ([True, False], ValueError, "where[1]: got 2 booleans, expected one for each of 4 features"),
        (
            torch.zeros(1, dtype=torch.long, device="meta"),
            ValueError,
            "where[1]: got indices on the meta device",
        ),
    ],
)
def test_features_that_are_none_are_named(features, error, message):
    with pytest.raises(error, match=re.escape(message)):
        localize(2, 4, {1: features})


def test_ragged_tables_are_named():
    message = "LinearSites.output: got [[1.0, 0.0], [1.0]], expected weights, numbers in rows of one length"
    with pytest.raises(ValueError, match=re.escape(message)):
        LinearSites(output=[[1.0, 0.0], [1.0]])


@pytest.mark.parametrize("name", ["on", "off"])
def test_weights_of_localize_that_are_not_finite(name):
    with expect(ValueError, f"{name}: got nan, expected a finite number"):
        localize(2, 8, {1: [0]}, **{name: float("nan")})
