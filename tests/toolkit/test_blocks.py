"""Blocks: which elements of which parameters, in every architecture and in modules of one's own; overlaps; refusals."""

import model_zoo
import numpy as np
import pytest
import torch
from torch import nn

from gradroute import RoutedAttention, RoutedGatedMLP, RoutedMLP
from gradroute.blocks import Block, Units, check_disjoint
from gradroute.models import NANO_GPT, route, sgtm, unroute

UNITS = 4


def built(name):
    return model_zoo.build(name).eval(), NANO_GPT if name == "nano_gpt" else None


def perturbed_units(model, block):
    """The model with noise in all of a block's parameters."""
    state = block.state_dict(model)
    generator = torch.Generator().manual_seed(1)
    block.load_state_dict(
        model, {key: torch.randn(value.shape, generator=generator) for key, value in state.items()}
    )
    return state


@pytest.mark.parametrize("name", model_zoo.NAMES)
@pytest.mark.parametrize("what", ["units", "heads"])
def test_a_block_holds_what_makes_its_units_and_what_reads_them(name, what):
    """With a block's columns at zero, anything in its rows leaves the output as it was; and nothing else is in it."""
    model, architecture = built(name)
    tokens = torch.randint(3, model_zoo.VOCABULARY, (2, 8))
    block = getattr(Block, what)(model, 2, architecture=architecture)
    for piece, parameter in block.parameters(model):
        if piece.role == "output":
            piece.write(parameter, 0.0)
    before = model_zoo.logits_of(model, tokens)
    for piece, parameter in block.parameters(model):
        if piece.role == "input":
            piece.write(parameter, 3.0)
    assert torch.equal(model_zoo.logits_of(model, tokens), before)
    columns = next(piece for piece in block.pieces if piece.role == "output")
    assert columns.size > len(columns.index)
    assert block.has_influence(model) is False


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gpt_neox"])
def test_blocks_of_all_units_and_heads_cover_the_layers_once(name):
    model, architecture = built(name)
    covered = {}
    for what in ("units", "heads"):
        sizes = {part.size for part in getattr(Block, what)(model, 1, architecture=architecture).parts}
        for index in range(min(sizes)):
            # A block of one head lacks k and v of its group, so whole groups are taken.
            group = getattr(Block, what)(model, 1).parts[0].group
            if index % group == 0:
                block = getattr(Block, what)(model, range(index, index + group))
                for parameter, mask in block.masks(model).items():
                    covered[parameter] = covered.get(parameter, 0) + mask.int()
    for parameter, count in covered.items():
        assert (count == 1).all(), parameter
    biases_of_outputs = {"llama": 4, "gpt2": 4, "phi3": 0, "gpt_neox": 4}  # belongs to no block
    inner = [n for n, _ in model.named_parameters() if ".mlp." in n or "attn" in n or "attention." in n]
    inner = [n for n in inner if "norm" not in n]
    assert len(inner) - len(covered) == biases_of_outputs[name], sorted(set(inner) - set(covered))


def test_a_routed_model_has_the_same_blocks():
    model, _ = built("llama")
    plain = Block.units(model, UNITS) | Block.heads(model, 2)
    route(model, sgtm(model.config, forget_heads=2, forget_units=UNITS))
    routed = Block.units(model, UNITS) | Block.heads(model, 2)
    for one, two in zip(plain.pieces, routed.pieces, strict=True):
        assert (one.parameter, one.dim, one.role) == (two.parameter, two.dim, two.role)
        assert torch.equal(one.index, two.index)
    masks = routed.masks(model)
    unroute(model)
    assert masks.keys() == plain.masks(model).keys()


def test_layers_and_indices_of_own_modules():
    model = nn.ModuleList([RoutedMLP(8, 12), RoutedGatedMLP(8, 12), RoutedAttention(8, 4, 2)])
    block = Block.units(model, [0, -1, 5], layers=[1])
    assert [part.module for part in block.parts] == ["1"]
    assert block.parts[0].index.tolist() == [0, 5, 11]
    masks = block.masks(model)
    assert set(masks) == {"1.gate_proj.weight", "1.up_proj.weight", "1.down_proj.weight"}
    assert masks["1.up_proj.weight"].sum() == 3 * 8
    assert masks["1.down_proj.weight"][:, [0, 5, 11]].all()
    heads = Block.heads(model, slice(0, 2))
    assert {piece.parameter: piece.index.tolist() for piece in heads.pieces if "proj" in piece.parameter} == {
        "2.q_proj.weight": [0, 1, 2, 3],
        "2.k_proj.weight": [0, 1],
        "2.v_proj.weight": [0, 1],
        "2.o_proj.weight": [0, 1, 2, 3],
    }
    lone = Block.heads(model, [0])  # its group's other head stays, and k and v with it
    assert {piece.parameter for piece in lone.pieces} == {"2.q_proj.weight", "2.o_proj.weight"}


def test_units_between_linear_layers():
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2, bias=False))
    block = Block.units(model, 2, between=Units(inputs=["0"], outputs=["2"]))
    masks = block.masks(model)
    assert masks["0.weight"][4:].all()
    assert not masks["0.weight"][:4].any()
    assert masks["0.bias"].tolist() == [False] * 4 + [True] * 2
    assert masks["2.weight"][:, 4:].all()
    assert not masks["2.weight"][:, :4].any()


def test_state_dict_restores_every_bit():
    model, _ = built("gpt2")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    block = Block.units(model, UNITS) | Block.heads(model, 2)
    state = perturbed_units(model, block)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert len(changed) == len({piece.parameter for piece in block.pieces})
    block.load_state_dict(model, state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_overlaps_are_refused():
    model, _ = built("llama")
    first, second = Block.units(model, slice(0, 8)), Block.units(model, slice(7, 12))
    with pytest.raises(ValueError, match=r"blocks: got two that overlap in .*gate_proj.weight"):
        first | second
    with pytest.raises(ValueError, match=r"'a' and 'b', which overlap in \d+ elements of .*gate_proj"):
        check_disjoint({"a": first, "b": second}, model)
    crossing = Block.of(model, {"model.layers.0.mlp.down_proj.weight": (0, [0])})
    with pytest.raises(ValueError, match=r"overlap in 8 elements of .*down_proj"):
        check_disjoint({"units": first, "row": crossing}, model)
    check_disjoint({"a": first, "b": Block.units(model, slice(8, 12))}, model)


def test_numbers_of_numpy_and_torch_are_numbers():
    model, _ = built("llama")
    for three in (np.int64(3), torch.tensor(3)):
        assert Block.units(model, three).parts[0].index.tolist() == [61, 62, 63]
    with pytest.raises(ValueError, match=r"units: got indices of shape \[1, 2\], expected one dimension"):
        Block.units(model, [[1, 2]])


def test_tied_parameters_overlap():
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embedding"].weight
    rows = {name: Block.of(model, {f"{name}.weight": (0, [0, 1])}) for name in model}
    with pytest.raises(ValueError, match="'embedding' and 'head', which overlap in 8 elements"):
        check_disjoint(rows, model)


def test_refusals():
    model, _ = built("llama")
    with pytest.raises(
        ValueError, match=f"units: got {model_zoo.HIDDEN + 1}, expected an int from 1 to {model_zoo.HIDDEN}"
    ):
        Block.units(model, model_zoo.HIDDEN + 1)
    with pytest.raises(ValueError, match="units: got index 99, expected -"):
        Block.units(model, [99])
    with pytest.raises(TypeError, match=r"units: got indices of dtype torch.float64, expected integers"):
        Block.units(model, [0.5])
    with pytest.raises(ValueError, match=r"units: got \[\[1\], \[2, 3\]\], expected a slice, indices"):
        Block.units(model, [[1], [2, 3]])
    with pytest.raises(ValueError, match="which chooses none of 64"):
        Block.units(model, [])
    with pytest.raises(ValueError, match=r"layers: got \[5\], expected indices from 0 to 1"):
        Block.units(model, 2, layers=[5])
    with pytest.raises(
        ValueError, match="pieces: got 'nothing', expected the name of one of the model's parameters"
    ):
        Block.of(model, {"nothing": (0, 1)})
    with pytest.raises(ValueError, match="pieces: got none, expected at least one"):
        Block.of(model, {})
    with pytest.raises(TypeError, match="layers: got 0, expected a list of indices from 0 to 1"):
        Block.units(model, 2, layers=0)
    with pytest.raises(ValueError, match="inputs: got '0', expected a list of paths"):
        Units("0", "2")
    with pytest.raises(ValueError, match=r"pieces\['model.norm.weight'\]: got dimension 1"):
        Block.of(model, {"model.norm.weight": (1, 1)})
    with pytest.raises(TypeError, match="got a Linear of model_type None"):
        Block.units(nn.Linear(2, 2), 1)
    plain = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(ValueError, match="between: got layers of different numbers of units"):
        Block.units(plain, 1, between=Units(["0"], ["2"]))
    with pytest.raises(ValueError, match="between: got '7', expected the path of a submodule"):
        Block.units(plain, 1, between=Units(["7"], ["2"]))
    with pytest.raises(TypeError, match=r"1: got a ReLU, expected a torch.nn.Linear"):
        Block.units(plain, 1, between=Units(["1"], ["2"]))
    with pytest.raises(ValueError, match="expected a block of it: make it again after a change of shape"):
        Block.units(model, 2).tensors(plain)
    block = Block.units(model, 2)
    with pytest.raises(ValueError, match="state: got keys that differ"):
        block.load_state_dict(model, {})
    state = {key: value[:1] for key, value in block.state_dict(model).items()}
    with pytest.raises(ValueError, match=r"state\['0.*: got shape"):
        block.load_state_dict(model, state)
    with pytest.raises(ValueError, match="expected one of units or heads"):
        Block.of(model, {"model.norm.weight": (0, 1)}).has_influence(model)
