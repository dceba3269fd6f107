"""gradroute.testing: an op's samples lie in the file of its stem, and a new file there is all that a new op needs."""

import sys

import pytest

import gradroute
from gradroute import backends, testing
from gradroute.testing import ops


@pytest.mark.parametrize("op", backends.OPS)
def test_samples_lie_in_the_file_of_the_ops_stem(op):
    stem = getattr(gradroute, op).__module__.rpartition(".")[2]
    assert testing.OPS[op].formula.__module__ == f"gradroute.testing.ops.{stem}"


def test_ops_are_in_the_order_of_the_table():
    assert list(testing.OPS) == list(backends.OPS)


def test_a_new_file_is_found(tmp_path, monkeypatch):
    of_conv = "from .linear import OPS as of_linear\nOPS = {'routed_conv': of_linear['routed_linear']}\n"
    (tmp_path / "conv.py").write_text(of_conv)
    monkeypatch.setattr(ops, "__path__", [*ops.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "gradroute.testing.ops.conv", raising=False)
    found = ops._found()
    monkeypatch.delitem(sys.modules, "gradroute.testing.ops.conv")
    assert list(found) == [*backends.OPS, "routed_conv"]
    assert found["routed_conv"] == testing.OPS["routed_linear"]


def test_an_op_without_sites_takes_its_table():
    call = testing.sample("route_grad", tokens=5)
    assert call.sites is call.tables["table"]
    assert testing.OPS["route_grad"].make_sites({}) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sites": ("output", "ouput")},
            "sites: got 'ouput', expected all or sites of routed_linear: output, input",
        ),
        ({"tables": "dens"}, "tables: got 'dens', expected one of ones, zeros"),
        ({"strength": "tokens"}, "strength: got 'tokens', expected one of None, 'token'"),
        ({"gradient": "strided"}, "layout: got 'strided', expected one of contiguous"),
    ],
)
def test_unknown_words_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        testing.sample("routed_linear", tokens=3, **options)
    with pytest.raises(ValueError, match="op: got 'linear', expected one of route_grad, routed_linear"):
        testing.sample("linear")
