"""The CPU benchmark: rivals compute the same, a wrong kernel is not timed, ratios are those of the same rounds."""

import pytest
import torch

from bench import cpu, timing
from gradroute import MLPSites, Routes, native
from gradroute.tables import localize

pytestmark = pytest.mark.skipif(native.module is None, reason=str(native.load_error))


@pytest.fixture
def case():
    """A small case with a limit that cannot be missed and one that cannot be reached."""
    ids = torch.arange(64) % 2
    table = localize(2, 16, {1: slice(12, 16)})
    sample = cpu.gated_mlp(64, 8, 16, Routes.of(ids, 2), MLPSites(hidden=table))
    return cpu.Case("tiny", sample, table, (("unmasked", 1e9), ("detach", 0.0)))


def test_rivals_and_backends_have_the_same_gradients(case):
    steps = cpu.variants(case, ())
    assert list(steps) == ["unmasked", "detach", "hook", "torch", "cpu"]
    expected = steps["detach"]()
    for name in ("hook", "torch", "cpu"):
        for got, want in zip(steps[name](), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(steps["unmasked"]()[0], expected[0])


def test_the_report_has_every_ratio_and_verdict(case, monkeypatch):
    monkeypatch.setattr(cpu, "CASES", (lambda: case,))
    report = cpu.run(rounds=3)
    measured = report["cases"]["tiny"]["variants"]
    assert measured["unmasked"]["ratios"]["unmasked"] == 1
    assert all(0 < one["milliseconds"]["p20"] <= one["milliseconds"]["p80"] for one in measured.values())
    text = "\n".join(cpu.lines(report))
    assert "cpu must be at most 1000000000.0 × unmasked" in text
    assert text.count("reached") == 1
    assert text.count("MISSED") == 1


def test_a_wrong_kernel_is_not_timed(case, monkeypatch):
    monkeypatch.setattr(native, "masked_product_", lambda g, routes, table: None)
    monkeypatch.setattr(
        native, "glu_backward", lambda dz, gate, *rest, **keywords: (gate, gate, gate, None, None)
    )
    monkeypatch.setattr(cpu, "CASES", (lambda: case,))
    with pytest.raises(AssertionError, match="tiny on cpu: d"):
        cpu.run(rounds=3)


def test_a_ratio_is_the_median_over_paired_rounds():
    assert timing.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == 3.0
