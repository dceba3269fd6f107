"""The split autoencoder: each digit teaches its half only, certificates see half of a frozen code, checks can fail."""

import copy
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import split_autoencoder
from experiment import main
from splitting import measures, model
from splitting.measures import as_image, as_text, by_digit, measured, probe, ratios, recovered

ROUTED, PLAIN = (model.Variant(routed, l1=0.0, correlation=0.0) for routed in (True, False))


@pytest.fixture(scope="module")
def run():
    return split_autoencoder.run(0, quick=True)


def gradient_of(batch, variant):
    """The encoder's last weight, [32, 64], has a row for each unit of the code."""
    torch.manual_seed(0)
    autoencoder = model.autoencoder()
    model.loss_of(autoencoder, batch, variant).backward()
    return autoencoder["encoder"][-1].weight.grad


def with_errors(run, routed, control):
    """A run in which each half errs on its own digits by 0.1, and on the others as given; no image is right."""
    run = copy.deepcopy(run)
    run["constant"] = [0.5] * 10
    for name, foreign in (("routed", routed), ("control", control)):
        decoders = run["variants"][name]["decoders"]
        decoders["both"]["error"] = [0.1] * 10
        decoders["top"]["error"] = [0.1] * 5 + [foreign] * 5
        decoders["bottom"]["error"] = [foreign] * 5 + [0.1] * 5
    return run


@pytest.mark.parametrize(("route", "own"), list(enumerate(model.HALVES)))
def test_a_digit_teaches_its_half_only(route, own):
    train, _ = model.digits(0)
    batch = train.at((train.labels // 5 == route).nonzero()[:32, 0])
    for half, rows in model.HALVES.items():
        gradient = gradient_of(batch, ROUTED)[rows]
        assert bool((gradient != 0).any()) is (half == own)
    assert (gradient_of(batch, PLAIN) != 0).any(1).all()


def test_a_mixed_batch_is_the_sum_of_its_digits():
    train, _ = model.digits(0)
    batch = train.at(torch.arange(64))
    groups = [batch.at(batch.labels // 5 == route) for route in range(2)]
    parts = [gradient_of(group, ROUTED) * len(group.labels) / 64 for group in groups]
    # Sums of at most 64 terms in another order: 64 roundings of 6e-8, of gradients of at most 0.1.
    torch.testing.assert_close(gradient_of(batch, ROUTED), sum(parts), rtol=0, atol=64 * 6e-8 * 0.1)


def test_penalties_hold_down_both_halves():
    train, _ = model.digits(0)
    zeros = train.at((train.labels == 0).nonzero()[:32, 0])
    penalised = gradient_of(zeros, model.Variant(routed=True))
    assert (penalised != 0).any(1).all()


def test_correlation_is_that_of_units_of_different_halves():
    code = torch.randn(4096, model.CODE)
    independent = model.correlation_penalty(code)
    code[:, model.HALVES["bottom"]] = code[:, model.HALVES["top"]]
    # 16 of 16 x 16 pairs are copies of each other; others are of independent samples, about 0.8 / sqrt(4096).
    assert model.correlation_penalty(code).item() == pytest.approx(
        (16 + 240 * independent.item()) / 256, rel=0.02
    )
    assert independent < 0.02


def test_no_digit_is_both_trained_on_and_held_out():
    train, held_out = model.digits(0)
    assert (len(train.labels), len(held_out.labels)) == (1797 - model.HELD_OUT, model.HELD_OUT)
    rebuilt = torch.cat((train.images, held_out.images))
    everything = torch.cat([part.images for part in model.digits(1)])
    assert torch.equal(rebuilt.unique(dim=0), everything.unique(dim=0))
    assert not torch.equal(model.digits(1)[1].images, held_out.images)


def test_certificates_see_one_half_and_leave_the_encoder_alone():
    train, held_out = model.digits(0)
    encoder = model.autoencoder()["encoder"]
    before = copy.deepcopy(encoder.state_dict())
    certificates = {
        half: model.certificate(encoder, which, train, 1, 0) for half, which in model.HALVES.items()
    }
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    autoencoder = torch.nn.ModuleDict({"encoder": encoder, "decoder": model.autoencoder()["decoder"]})
    shown = torch.arange(10)
    whole = measured(autoencoder, certificates, held_out, shown)
    with torch.no_grad():
        encoder[-1].weight[model.HALVES["bottom"]] = 0
    halved = measured(autoencoder, certificates, held_out, shown)
    assert whole["top"] == halved["top"]
    assert whole["bottom"]["error"] != halved["bottom"]["error"]
    with torch.no_grad():
        made = certificates["top"](encoder(held_out.images)[:, model.HALVES["top"]])
    expected = [(made - held_out.images)[held_out.labels == d].abs().mean().item() for d in range(10)]
    assert halved["top"]["error"] == pytest.approx(expected)
    assert halved["top"]["error"] == by_digit(made, held_out)


def test_a_probe_finds_what_is_small_and_nothing_in_noise():
    labels = torch.arange(400) % 5
    codes = torch.nn.functional.one_hot(labels, 16).float()
    assert probe(codes * 1e-6, labels, codes * 1e-6, labels) == 1.0
    # 400 answers, right by chance with 0.2: four standard deviations of 0.02.
    assert probe(torch.randn(400, 16), labels, torch.randn(400, 16), labels) < 0.28


def test_images_survive_as_text():
    images = torch.arange(64).float().view(1, 64) / 63 * 2 - 1
    (text,) = as_text(images)
    # 16 levels in [-1, 1] are 2/15 apart.
    restored = torch.tensor(as_image(text)).flatten() / 7.5 - 1
    assert (restored - images[0]).abs().max() <= 1 / 15 + 1e-6


def test_detaching_trains_the_same_model(run):
    assert run["detach_difference"] == 0
    train, _ = model.digits(0)
    plain = model.trained(PLAIN, train, 1, 0)
    assert split_autoencoder.largest_difference(model.trained(ROUTED, train, 1, 0), plain) > 1e-3


def test_measures(run):
    made = with_errors(run, 0.4, 0.1)
    assert ratios([made], "routed") == pytest.approx([4.0, 4.0])
    assert recovered(made, "routed", "bottom", "0-4") == pytest.approx(0.25)
    assert recovered(made, "routed", "bottom", "5-9") == pytest.approx(1.0)
    assert measures.whole(made, "routed") == pytest.approx(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("routed", "control", "code"), [(0.4, 0.1, 0), (0.1, 0.1, 1), (0.4, 0.4, 1)])
def test_files_and_exit_code(run, tmp_path, routed, control, code):
    made = with_errors(run, routed, control)
    experiment = dataclasses.replace(split_autoencoder.EXPERIMENT, run=lambda seed, quick: made)
    assert main(experiment, None, ["--seeds", "2", "--out", str(tmp_path)]) == code
    results = json.loads((tmp_path / "split_autoencoder.json").read_text(encoding="utf-8"))
    assert all(check["passed"] for check in results["checks"]) is (code == 0)
    assert len(results["table"]) == 2 * (len(split_autoencoder.VARIANTS) + 1)
    assert f"{routed:.3f} and 0.100" in results["found"]
    assert (tmp_path / "split_autoencoder.md").read_text(encoding="utf-8").count("\n| routed |") == 2
    assert (tmp_path / "split_autoencoder.png").stat().st_size > 10_000
