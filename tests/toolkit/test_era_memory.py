"""Memory of gradroute.era: never a second copy of the model, whatever its parameters are.

The model is one of the linear layers alone, so that the largest parameter is a small part of it.
"""

import pytest
import torch
from torch import nn

from bench import allocations
from gradroute import era
from gradroute.blocks import Block, Units
from gradroute.era import drawing

WIDTH, HIDDEN, LAYERS, ADDED = 64, 256, 12, 64
BETWEEN = [Units([f"{2 * i}"], [f"{2 * i + 1}"]) for i in range(LAYERS)]

# Indices, standard deviations, names: what does not grow with the model.
FLOOR = 40_000


def make(dtype=torch.float32, tied=False):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)))
    ).to(dtype)
    if tied:
        for i in range(2, 2 * LAYERS, 4):
            model[i].weight, model[i + 1].weight = model[0].weight, model[1].weight
    return model


def trained(model):
    """An optimizer with a state of two moments a parameter."""
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def everything(model, optimizer=None):
    states = [] if optimizer is None else optimizer.state.values()
    moments = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return allocations.nbytes([*model.parameters(), *moments])


def largest(model):
    return max(parameter.nbytes for parameter in model.parameters())


def steps(model, optimizer, run):
    """expand, ablate, contract, and a block that is taken out and put back, each by `run(name, call)`."""
    given = {"optimizer": optimizer}
    block = run("expand", lambda: era.expand(model, ADDED, between=BETWEEN, zero_output=False, **given))
    run("resample", lambda: era.ablate(model, block, how="resample", **given))
    run("ablate", lambda: era.ablate(model, block, **given))
    run("contract", lambda: era.contract(model, block, **given))
    part = Block.units(model, ADDED, between=BETWEEN)
    state = part.state_dict(model)
    run("slice", lambda: era.ablate(model, part, how="slice", **given))
    run("merge", lambda: era.merge(model, part, state, **given))


@pytest.mark.parametrize(
    ("kind", "optimized"),
    [({}, True), ({"dtype": torch.bfloat16}, False), ({"tied": True}, True)],
    ids=["fp32, optimizer", "bf16", "tied, optimizer"],
)
def test_every_step_needs_the_model_and_one_parameter(kind, optimized, monkeypatch):
    monkeypatch.setattr(drawing, "_AT_ONCE", 4096)  # elements, of which a standard deviation may copy so many
    sizes = {}
    with allocations.Meter() as meter:
        model = make(**kind)
        optimizer = trained(model) if optimized else None
        dtype, ties = model[0].weight.dtype, len({id(layer.weight) for layer in model})

        def run(name, call):
            before = everything(model, optimizer)
            result = meter.measured(name, call)
            sizes[name] = before, everything(model, optimizer), largest(model)
            assert len({id(layer.weight) for layer in model}) == ties
            assert {layer.weight.dtype for layer in model} == {dtype}
            return result

        steps(model, optimizer, run)
    for name, (before, after, parameter) in sizes.items():
        peak, left = meter.readings[name]
        assert left == pytest.approx(after - before, abs=FLOOR), (
            name
        )  # what was cut is free, and nothing is kept
        assert peak <= max(0, after - before) + parameter + FLOOR, (name, peak, after - before, parameter)
    assert sizes["contract"][1] == sizes["expand"][0] < sizes["expand"][1]


def test_a_gate_keeps_the_output_weights_of_its_block_alone():
    with allocations.Meter() as meter:
        model = make()
        block = Block.units(model, ADDED, between=BETWEEN)
        kept = 4 * LAYERS * WIDTH * ADDED
        gate = meter.measured("made", lambda: era.gate(model, block, 3.0))
        meter.measured("moved", lambda: setattr(gate, "scale", 2.0))
        meter.measured("merged", gate.merge)
        meter.measured("removed", gate.remove)
    for name, reading in meter.readings.items():
        new = kept if name == "made" else 0
        assert reading.left == pytest.approx(new, abs=FLOOR), name
        assert reading.peak <= new + largest(model) + FLOOR, name


def test_a_model_is_exported_without_a_copy(tmp_path):
    from safetensors.torch import load_file

    with allocations.Meter() as meter:
        model = make(tied=True)
        model.register_buffer("odd", torch.arange(5, dtype=torch.bfloat16))
        for name in ("model.pt", "model.safetensors"):
            meter.measured(name, lambda name=name: era.export(model, tmp_path / name))
    for name, load in (("model.pt", torch.load), ("model.safetensors", load_file)):
        assert meter.readings[name].peak <= FLOOR
        state = load(tmp_path / name)
        assert state.keys() == model.state_dict().keys()
        for key, value in model.state_dict().items():
            assert torch.equal(state[key], value), key


def test_a_part_of_a_larger_tensor_is_saved_without_the_rest(tmp_path):
    model = nn.Linear(4, 4, bias=False)
    model.weight = nn.Parameter(torch.randn(1000, 4)[:4])
    era.export(model, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").stat().st_size < 4000


def test_shapes_change_on_the_meta_device_and_values_do_not():
    model = make().to("meta")
    block = era.expand(model, ADDED, between=BETWEEN, std=0.1, zero_output=False)
    assert {layer.weight.is_meta for layer in model} == {True}
    assert (model[0].weight.shape, model[1].in_features) == ((HIDDEN + ADDED, WIDTH), HIDDEN + ADDED)
    state = block.state_dict(model)
    for call in (
        lambda: era.ablate(model, block),
        lambda: era.ablate(model, block, how="resample"),
        lambda: era.gate(model, block, 2.0),
        lambda: era.export(model, "nowhere"),
        lambda: block.has_influence(model),
    ):
        with pytest.raises(ValueError, match=r"\d.weight(: got a parameter)? on the meta device, expected"):
            call()
    era.contract(model, block)
    assert model[0].weight.shape == (HIDDEN, WIDTH)
    with pytest.raises(ValueError, match="the state's values would be lost when the model's are loaded"):
        era.merge(model, block, {key: torch.zeros_like(value, device="cpu") for key, value in state.items()})
    era.merge(model, block, state)
    era.ablate(model, block, how="slice")
    assert model[0].weight.shape == (HIDDEN, WIDTH)


def test_drawing_in_parts_is_drawing():
    """More elements than are read at once: the standard deviation is that of all of them, and every value is drawn."""
    for dtype in (torch.float32, torch.bfloat16):
        model = make(dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(drawing, "_AT_ONCE", 1000)
            with torch.no_grad():
                model[0].weight += 3.0  # a mean apart from 0, which parts have to agree about
            expected = float(model[0].weight.detach().double().std(correction=0))
            block = era.expand(model, ADDED, between=BETWEEN)
            piece = block.pieces[0]
            new = piece.of(model[0].weight).float()
            assert float(new.std()) == pytest.approx(expected, rel=0.05)  # of 4096 values: 1/√8192 = 1 %
            assert (new.abs().sum(1) > 0).all()
            scale = drawing.scale_of_rest(piece, dict(era.surgery.homes(model, block.pieces))[piece])
            assert scale == pytest.approx(expected, rel=1e-4)
