"""The plans of published uses, their tables, and the shapes of models that plans are given."""

import pytest
import torch

pytest.importorskip("transformers")

from model_zoo import HEADS, HIDDEN, LAYOUTS, NAMES, WIDTH, fresh, plain
from routed_models import OF_TRANSFORMERS, expect, routed, table, tables_of

from gradroute import MLPSites, Table, models
from gradroute.models import RoutingPlan, Shape


def test_localize_mlp():
    plan = models.localize_mlp(range(1, 3), 5, route=2, off=-0.5)
    assert plan.num_routes == 3
    rows = torch.ones(3, 24)
    rows[2, 5:] = -0.5
    first, *chosen, last = tables_of(plan)
    assert first == last == {}
    for tables in chosen:
        assert tables.keys() == {"mlp.hidden"}
        assert torch.equal(tables["mlp.hidden"], rows)
    plan = models.localize_mlp([0], [3, 23], num_routes=5, on=2.0)
    rows = torch.ones(5, 24)
    rows[1] = 0
    rows[1, [3, 23]] = 2
    assert torch.equal(tables_of(plan)[0]["mlp.hidden"], rows)
    rows = torch.zeros(24)
    rows[20:] = 1
    plan = models.localize_mlp([3], slice(20, 24))
    assert torch.equal(tables_of(plan)[3]["mlp.hidden"][1], rows)
    with expect(ValueError, "layers: got [4], expected indices from 0 to 3"):
        tables_of(models.localize_mlp([0, 4], 5))


def test_steering():
    plan = models.steering([1, 2], dim=3, off=0.25)
    rows = torch.ones(2, 16)
    rows[1] = 0.25
    rows[1, 3] = 1
    first, *chosen, last = tables_of(plan)
    assert first == last == {}
    for tables in chosen:
        assert tables.keys() == {"residual.post"}
        assert torch.equal(tables["residual.post"], rows)
    several = models.steering([0], dim=[0, 15], route=0, num_routes=2)
    assert tables_of(several)[0]["residual.post"].tolist() == [[1.0, *[0.0] * 14, 1.0], [1.0] * 16]
    with expect(ValueError, "layers: got [-1]"):
        tables_of(models.steering([-1]))
    with expect(ValueError, "dim: got index 16"):
        tables_of(models.steering([0], 16))


def test_era():
    plan = models.era(units=8, off=-0.1)
    rows = torch.ones(2, 24)
    rows[1, :16] = -0.1
    for tables in tables_of(plan):
        assert tables.keys() == {"mlp.hidden"}
        assert torch.equal(tables["mlp.hidden"], rows)
    for tables in tables_of(models.era(units=8, off=-0.1, site="update")):
        assert tables.keys() == {"mlp.update"}
        assert torch.equal(tables["mlp.update"], rows)
    only = tables_of(models.era([2], units=8))
    assert [bool(tables) for tables in only] == [False, False, True, False]
    with expect(ValueError, "units: got 25, expected an int from 1 to 24"):
        tables_of(models.era(units=25))


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_shape_of_configurations(name):
    layout = LAYOUTS[name]
    layers = len(plain(name).get_submodule(layout.layers))
    assert Shape.of(plain(name).config) == Shape(
        layers, WIDTH, HIDDEN, HEADS, layout.kv_heads, layout.head_dim
    )


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_shape_is_read_off_layers_where_no_configuration_says_it(name):
    model = fresh(name)
    architecture = models.ARCHITECTURES[model.config.model_type]
    shape = architecture.layer.shape_of(model.get_submodule(architecture.layers))
    assert shape == Shape.of(model.config)


@pytest.mark.parametrize("name", NAMES)
def test_shape_that_plans_are_given(name):
    layout, given = LAYOUTS[name], []

    def sites(index, shape):
        given.append((index, shape))
        return MLPSites(hidden=table(shape.d_ff))

    model = routed(name, RoutingPlan(2, mlp=sites))
    layers = len(model.get_submodule(layout.layers))
    biased = layout.output_bias
    shape = Shape(
        layers, WIDTH, HIDDEN, HEADS, layout.kv_heads, layout.head_dim, biased, biased, added_units=0
    )
    assert given == [(index, shape) for index in range(layers)]
    assert isinstance(model.routing_plan, RoutingPlan)
    assert all(isinstance(entry.tables["hidden"], Table) for entry in model.routing_plan.mlp)


SMALL = Shape(2, 16, 24, 4, 2, 4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: models.sgtm(SMALL, 1.5),
            TypeError,
            "forget_heads: got 1.5, expected an int",
        ),
        (
            lambda: models.sgtm(SMALL, 1, 16.0),
            TypeError,
            "forget_units: got 16.0, expected an int",
        ),
        (lambda: models.era(units=1.5), TypeError, "units: got 1.5, expected an int"),
        (lambda: models.era(site="pre"), ValueError, "site: got 'pre', expected one of 'hidden', 'update'"),
        (lambda: models.localize_mlp([0], 4, route="1"), TypeError, "route: got '1', expected an int"),
        (lambda: models.localize_mlp([0], 4, route=-1), ValueError, "route: got -1, expected an int from 0"),
        (
            lambda: models.steering([0], 1, route=5, num_routes=2),
            ValueError,
            "route: got 5, expected 0 <= route < num_routes = 2",
        ),
    ],
)
def test_numbers_of_plans_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
