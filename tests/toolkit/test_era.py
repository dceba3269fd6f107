"""gradroute.era: what models compute after each step, what optimizers keep of it, and what is refused."""

import copy

import model_zoo
import pytest
import torch
from torch import nn

from gradroute import MLPSites, RoutedAttention, RoutedGatedMLP, RoutedMLP, Routes, era
from gradroute import models as routed_models
from gradroute.blocks import Block, Units
from gradroute.models import NANO_GPT, route, sgtm, unroute
from gradroute.tables import localize

ADDED = 6
FREE_HEADS = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3")


def built(name):
    return model_zoo.build(name).eval(), NANO_GPT if name == "nano_gpt" else None


def bits(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_bits(model, before):
    state = model.state_dict()
    assert state.keys() == before.keys()
    for key, value in state.items():
        assert torch.equal(value, before[key]), key


def assert_same(got, expected):
    """Sums of the same products, with zeros among them, differ by roundings of fp32."""
    assert model_zoo.error(got, expected) < 1e-5


def noise_outputs(model, block):
    for piece, parameter in block.parameters(model):
        if piece.role == "output":
            piece.write(parameter, 0.1 * torch.randn(piece.of(parameter).shape))


@pytest.fixture
def tokens():
    return torch.randint(3, model_zoo.VOCABULARY, (2, 10))


class Own(nn.Module):
    """A residual stream through gradroute's own layers."""

    def __init__(self):
        super().__init__()
        self.attention = RoutedAttention(8, 4, 2, bias=True)
        self.mlp = RoutedMLP(8, 12)
        self.gated = RoutedGatedMLP(8, 12, bias=True)

    def forward(self, x):
        x = x + self.attention(x)
        x = x + self.mlp(x)
        return x + self.gated(x)


@pytest.mark.parametrize("name", FREE_HEADS)
def test_added_heads_change_no_output_and_go_again(name, tokens, tmp_path):
    model, _ = built(name)
    before, plain = bits(model), model_zoo.logits_of(model, tokens)
    heads = model_zoo.HEADS  # Llama and Gemma 3 want a divisor of d_model
    block = era.expand(model, ADDED, heads=heads)
    assert_same(model_zoo.logits_of(model, tokens), plain)
    assert model.config.num_attention_heads == 2 * heads
    noise_outputs(model, block)
    grown = model_zoo.logits_of(model, tokens)
    assert not torch.allclose(grown, plain, atol=1e-4)
    era.export(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(model_zoo.logits_of(loaded, tokens), grown)
    # The heads that were there have not moved: a plan of the new heads alone routes as ever.
    route(model, sgtm(model.config, forget_heads=heads, forget_units=ADDED))
    seen = model_zoo.logits_of(model, tokens, route_ids=torch.zeros_like(tokens))
    assert_same(seen, plain)
    unroute(model)
    era.ablate(model, block, how="slice")
    assert_bits(model, before)
    assert_same(model_zoo.logits_of(model, tokens), plain)
    assert model.config.num_attention_heads == model_zoo.HEADS


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "gpt_neox"])
def test_heads_whose_width_follows_from_their_number_are_refused(name):
    model, _ = built(name)
    before = bits(model)
    with pytest.raises(TypeError, match="in which the width of a head is d_model over their number"):
        era.expand(model, ADDED, heads=2)
    assert_bits(model, before)


def test_own_layers_grow_and_shrink():
    model, x = Own(), torch.randn(2, 5, 8)
    before, plain = bits(model), model(x)
    block = era.expand(model, ADDED, heads=2, zero_output=False)
    assert (model.mlp.fc_in.out_features, model.attention.heads, model.attention.kv_heads) == (18, 6, 3)
    assert not torch.allclose(model(x), plain, atol=1e-4)
    era.ablate(model, block)
    assert model_zoo.error(model(x), plain) < 1e-6
    era.contract(model, block)
    assert_bits(model, before)
    assert model_zoo.error(model(x), plain) < 1e-6
    assert (model.mlp.fc_in.out_features, model.attention.heads, model.attention.kv_heads) == (12, 4, 2)
    model.mlp.sites = MLPSites(hidden=localize(2, 12, {1: slice(0, 4)}))
    with pytest.raises(ValueError, match="got mlp with sites, whose tables have its width"):
        era.expand(model, ADDED)


def test_plain_linear_layers_grow_and_shrink():
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    x = torch.randn(4, 3)
    before, plain = bits(model), model(x)
    block = era.expand(model, 5, between=Units(inputs=["0"], outputs=["2"]), std=0.5)
    assert model_zoo.error(model(x), plain) < 1e-6
    assert (model[0].out_features, model[2].in_features) == (11, 11)
    assert 0.2 < float(model[0].weight.detach()[6:].std()) < 1.0
    era.contract(model, block)
    assert_bits(model, before)


@pytest.mark.parametrize("index", [slice(0, 4), [1, 7, 30]])
def test_any_units_are_taken_out(index, tokens):
    model, _ = built("phi3")  # gate and up are one layer
    block = Block.units(model, index)
    era.ablate(model, block)
    ablated = model_zoo.logits_of(model, tokens)
    era.contract(model, block)
    assert_same(model_zoo.logits_of(model, tokens), ablated)
    assert model.config.intermediate_size == model_zoo.HIDDEN - len(block.parts[0].index)


def test_a_block_that_was_taken_out_is_put_back(tokens):
    model, _ = built("phi3")
    before, whole = bits(model), model_zoo.logits_of(model, tokens)
    block = Block.units(model, [1, 7, 30]) | Block.heads(model, 2)
    state = block.state_dict(model)
    era.ablate(model, block, how="slice")
    assert not torch.allclose(model_zoo.logits_of(model, tokens), whole, atol=1e-4)
    broken = dict(list(state.items())[1:])
    with pytest.raises(ValueError, match="state: got keys"):
        era.merge(model, block, broken)
    era.merge(model, block, state)
    assert_bits(model, before)
    assert torch.equal(model_zoo.logits_of(model, tokens), whole)
    with pytest.raises(ValueError, match="what the block leaves of it"):
        era.merge(model, block, state)


def trained(model, optimizer, x, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "RoutedAdamW"])
def test_an_optimizer_goes_on_with_the_old_state_and_zeros(kind):
    from gradroute.optim import RoutedAdamW

    torch.manual_seed(1)
    model, x = Own(), torch.randn(2, 5, 8)
    options = {"momentum": 0.9} if kind == "SGD" else {}
    make = RoutedAdamW if kind == "RoutedAdamW" else getattr(torch.optim, kind)
    optimizer = make(model.parameters(), lr=1e-2, **options)
    trained(model, optimizer, x)
    old = {name: copy.deepcopy(optimizer.state[p]) for name, p in model.named_parameters()}
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    block = era.expand(model, ADDED, heads=2, optimizer=optimizer)
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] != ids
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    masks = block.masks(model)
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                new = masks.get(name, torch.zeros(value.shape, dtype=torch.bool))
                assert (value[new] == 0).all(), (name, key)
                assert torch.equal(value[~new], old[name][key].flatten()), (name, key)
    assert len(optimizer.state) == len(list(model.parameters()))
    trained(model, optimizer, x)  # shapes fit
    assert block.has_influence(model)
    era.ablate(model, block, optimizer=optimizer)
    for name, parameter in model.named_parameters():
        if name in masks:
            for key, value in optimizer.state[parameter].items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    assert (value[masks[name]] == 0).all(), (name, key)
    era.contract(model, block, optimizer=optimizer)
    trained(model, optimizer, x)
    assert not optimizer.state.keys() - set(model.parameters())


def test_momentum_brings_nothing_back_when_the_optimizer_is_given():
    """Hidden units with relu have gradients of 0 after zeroing; without the optimizer's momentum nothing moves."""
    torch.manual_seed(1)
    model = RoutedMLP(8, 12, activation="relu")
    x = torch.randn(20, 8)
    for given in (True, False):
        other = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
        trained(other, optimizer, x)
        block = Block.units(other, 4)
        era.ablate(other, block, optimizer=optimizer if given else None)
        trained(other, optimizer, x)
        assert block.has_influence(other) is not given


def test_resampling_draws_like_the_rest(tokens):
    model, _ = built("llama")
    before = bits(model)
    block = Block.units(model, 32)
    state = block.state_dict(model)
    era.ablate(model, block, how="resample", generator=torch.Generator().manual_seed(3))
    again, _ = built("llama")
    again.load_state_dict(before)
    era.ablate(again, block, how="resample", generator=torch.Generator().manual_seed(3))
    assert_bits(model, bits(again))
    masks = block.masks(model)
    for name, value in model.state_dict().items():
        mask = masks.get(name, torch.zeros(value.shape, dtype=torch.bool))
        assert torch.equal(value[~mask], before[name][~mask]), name
        if value.dim() == 1 and mask.any():
            assert (value[mask] == 0).all()
        elif mask.any():
            assert not torch.equal(value[mask], before[name][mask])
            # 32 of 64 units × 32 features: a standard deviation is known to 1/√2048 = 2 %.
            assert 0.9 < float(value[mask].std() / value[~mask].std()) < 1.1, name
    block.load_state_dict(model, state)
    assert_bits(model, before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_a_gate_scales_what_the_block_adds(name, tokens):
    model, _ = built(name)
    before, whole = bits(model), model_zoo.logits_of(model, tokens)
    block = Block.units(model, 8) | Block.heads(model, 2)
    outputs = {piece.parameter: piece for piece in block.pieces if piece.role == "output"}
    with era.gate(model, block, 3.0) as gate:
        for key, value in model.state_dict().items():
            expected = before[key].clone()
            if key in outputs:
                expected.index_copy_(outputs[key].dim, outputs[key].index, 3 * outputs[key].of(before[key]))
            assert torch.equal(value, expected), key
        assert not torch.allclose(model_zoo.logits_of(model, tokens), whole, atol=1e-4)
        gate.scale = 0.0
        off = model_zoo.logits_of(model, tokens)
    assert_bits(model, before)  # also from weights of 0
    era.ablate(model, block)
    assert_same(off, model_zoo.logits_of(model, tokens))


def test_gates_merge_and_notice_training():
    model = RoutedMLP(8, 12)
    x = torch.randn(3, 8)
    block = Block.units(model, 4)
    gate = era.gate(model, block, 2.0)
    doubled = model(x)
    gate.merge()
    gate.remove()
    assert torch.equal(model(x), doubled)
    gate.scale = 0.5
    with torch.no_grad():
        model.fc_out.weight += 1
    with pytest.raises(RuntimeError, match=r"fc_out.weight was changed by something else since"):
        gate.remove()
    with pytest.raises(ValueError, match="scale: got inf, expected a finite number"):
        era.gate(model, block, float("inf"))
    with pytest.raises(ValueError, match=r"block: got .*, expected one of units or heads"):
        era.gate(model, Block.of(model, {"fc_in.weight": (0, 2)}), 2.0)


def test_gate_works_while_routed():
    model = RoutedMLP(8, 12, sites=MLPSites(hidden=localize(2, 12, {1: slice(8, 12)})))
    x, routes = torch.randn(3, 8), Routes.of(torch.tensor([0, 1, 1]), 2)
    with era.gate(model, Block.units(model, 4), 2.0):
        assert torch.equal(model(x, routes), model(x))


def test_whole_round_of_era(tokens):
    """Only what the added units learnt goes with them: everything else is bit for bit what training made of it."""
    from gradroute.optim import RoutedAdamW, routed_param_groups

    model, _ = built("llama")
    model.train()
    block = era.expand(model, ADDED)
    route(model, routed_models.era(units=ADDED))
    optimizer = RoutedAdamW(routed_param_groups(model), lr=1e-2)
    for _ in range(3):
        model(tokens, labels=tokens, route_ids=torch.ones_like(tokens)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = bits(model)
    unroute(model)
    with pytest.raises(ValueError, match="still has influence"):
        era.contract(model, block)
    assert_bits(model, after)
    era.ablate(model, block)
    ablated = model_zoo.logits_of(model.eval(), tokens)
    era.contract(model, block)
    assert_same(model_zoo.logits_of(model, tokens), ablated)
    for key, value in model.state_dict().items():
        kept = after[key][tuple(slice(0, size) for size in value.shape)]
        assert torch.equal(value, kept), key


def test_export_of_a_plain_module(tmp_path):
    model = Own()
    era.export(model, tmp_path / "model.pt")
    other = Own()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert_bits(other, bits(model))


def test_refusals(tokens):
    model, _ = built("llama")
    before = bits(model)
    block = Block.units(model, 4)
    with pytest.raises(ValueError, match=r"how: got 'gone', expected one of 'zero', 'slice', 'resample'"):
        era.ablate(model, block, how="gone")
    with pytest.raises(ValueError, match=r"block: got .* which still has influence"):
        era.contract(model, block)
    with pytest.raises(ValueError, match=r"units: got all 64 of .*mlp, expected some to remain"):
        era.ablate(model, Block.units(model, 64), how="slice")
    with pytest.raises(ValueError, match="expected as many of each of the model's 2 layers"):
        era.ablate(model, Block.units(model, 4, layers=[0]), how="slice")
    with pytest.raises(ValueError, match="expected whole groups of the 2 that share"):
        era.ablate(model, Block.heads(model, [0]), how="slice")
    with pytest.raises(ValueError, match="heads: got 1, expected a multiple of the 2 that share"):
        era.expand(model, heads=1)
    with pytest.raises(
        ValueError, match=r"heads: got numbers that LlamaConfig refuses.*multiple of the number of att"
    ):
        era.expand(model, heads=2)
    with pytest.raises(ValueError, match="units: got 0, expected a positive number"):
        era.expand(model)
    with pytest.raises(TypeError, match=r"units: got 2.5, expected an int"):
        era.expand(model, 2.5)
    with pytest.raises(ValueError, match="expected one of units or heads"):
        era.contract(model, Block.of(model, {"lm_head.weight": (0, 2)}))
    assert_bits(model, before)
    era.ablate(model, block)
    with pytest.raises(ValueError, match=r"has no influence on the model: .* as it was ablated before"):
        era.ablate(model, block)
    with pytest.warns(RuntimeWarning, match="takes the last 4 of .*expand added 0 to this model"):
        route(model, routed_models.era(units=4))
    for call in (
        lambda: era.expand(model, 2),
        lambda: era.contract(model, block),
        lambda: era.merge(model, block, {}),
    ):
        with pytest.raises(ValueError, match="got a routed model, expected an ordinary one"):
            call()


def test_joined_blocks_of_one_layer_are_one(tokens):
    """The second block has the indices of the model before the first block was taken out."""
    model, _ = built("phi3")
    whole, _ = built("phi3")
    whole.load_state_dict(model.state_dict())
    joined = Block.units(model, [3, 60]) | Block.units(model, [1, 62]) | Block.heads(model, [2, 3])
    assert len(joined.parts) == 2 * len(model.model.layers)
    era.ablate(model, joined, how="slice")
    era.ablate(whole, Block.units(whole, [1, 3, 60, 62]) | Block.heads(whole, 2), how="slice")
    assert_bits(model, bits(whole))
    assert model.config.intermediate_size == model_zoo.HIDDEN - 4
    with pytest.raises(ValueError, match=r"heads of .* in two blocks, expected them in one"):
        Block.heads(whole, [0]) | Block.heads(whole, [1])


@pytest.mark.parametrize("what", ["block", "route"])
def test_a_gradient_that_is_left_over_brings_nothing_back(tokens, what):
    model, _ = built("llama")
    model.train()
    block = Block.units(model, ADDED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    route(model, sgtm(model.config, forget_heads=0, forget_units=ADDED))
    for _ in range(2):
        model(tokens, labels=tokens, route_ids=torch.ones_like(tokens)).loss.backward()
        optimizer.step()
    if what == "block":
        era.ablate(model, block, optimizer=optimizer)
    else:
        routed_models.ablate(model, 0, optimizer=optimizer)
    optimizer.step()
    unroute(model)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert not block.has_influence(model)


def test_a_gate_notices_that_its_parameters_are_gone():
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    between = Units(["0"], ["2"])
    gate = era.gate(model, Block.units(model, 2, between=between), 3.0)
    era.expand(model, 2, between=between)
    with pytest.raises(RuntimeError, match=r"2.weight was changed by something else since"):
        gate.remove()
    half = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).half()
    before = bits(half)
    with pytest.raises(ValueError, match=r"2.weight is not finite in torch.float16, expected a smaller one"):
        era.gate(half, Block.units(half, 2, between=between), 1e7)
    assert_bits(half, before)


def test_what_would_fail_halfway_changes_nothing():
    between = Units(["0"], ["2"])

    def plain():
        return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))

    model = plain()
    before, x = bits(model), torch.randn(4, 3)
    for std, error in ((-1.0, ValueError), (float("nan"), ValueError), ("wide", TypeError)):
        with pytest.raises(error, match=r"std: got .*, expected a finite number of 0 or more"):
            era.expand(model, 2, between=between, std=std)
    with pytest.raises(ValueError, match=r"overlap in 0.weight, expected disjoint ones"):
        era.expand(model, 2, between=[between, between])
    with pytest.raises(TypeError, match=r"optimizer: got 'sgd', expected a torch.optim.Optimizer"):
        era.expand(model, 2, between=between, optimizer="sgd")
    with pytest.raises(ValueError, match="expected a rest whose standard deviation"):
        era.ablate(model, Block.units(model, 6, between=between), how="resample")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model[0].weight] = {"exp_avg_sq_row": torch.zeros(6)}
    with pytest.raises(
        TypeError, match=r"optimizer: got state 'exp_avg_sq_row' of shape .* make the optimizer anew"
    ):
        era.expand(model, 2, between=between, optimizer=optimizer)
    assert_bits(model, before)
    tied = nn.ModuleList([RoutedMLP(8, 12), RoutedMLP(8, 12)])
    tied[1].fc_in.weight = tied[0].fc_in.weight
    with pytest.raises(ValueError, match=r"got 0.fc_in.weight and 1.fc_in.weight tied, of which"):
        era.ablate(tied, Block.units(tied, 4, layers=[0]), how="slice")
    routed = RoutedMLP(8, 12, sites=MLPSites(hidden=localize(2, 12, {1: slice(0, 4)})))
    with pytest.raises(ValueError, match="got RoutedMLP with sites, whose tables have its width"):
        era.ablate(routed, Block.units(routed, 2), how="slice")
    llama, _ = built("llama")
    inside = Units(
        ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"], ["model.layers.0.mlp.down_proj"]
    )
    with pytest.raises(ValueError, match="whose configuration could not say their new width"):
        era.expand(llama, 2, between=inside)
    assert model(x).shape == (4, 2)


@pytest.mark.parametrize("block_dim", [0, 1])
def test_step_counts_of_rows_and_columns_go_with_them(block_dim):
    from gradroute.optim import RoutedAdamW

    model = RoutedMLP(8, 12, bias=False)
    optimizer = RoutedAdamW(model.parameters(), lr=1e-2, block_dim=block_dim)
    trained(model, optimizer, torch.randn(5, 8), steps=3)
    block = era.expand(model, 4, optimizer=optimizer)
    inner, outer = (optimizer.state[linear.weight]["step"] for linear in (model.fc_in, model.fc_out))
    grown, other = (inner, outer) if block_dim == 0 else (outer, inner)
    assert grown.flatten().tolist() == [3.0] * 12 + [0.0] * 4
    assert other.flatten().tolist() == [3.0] * 8
    trained(model, optimizer, torch.randn(5, 8), steps=2)
    era.ablate(model, block, optimizer=optimizer)
    grown = optimizer.state[(model.fc_in if block_dim == 0 else model.fc_out).weight]["step"]
    assert grown.flatten().tolist() == [5.0] * 12 + [0.0] * 4


def test_state_may_come_in_any_order(tokens):
    model, _ = built("llama")
    before = bits(model)
    block = Block.units(model, 4) | Block.heads(model, 2)
    state = dict(sorted(block.state_dict(model).items()))  # safetensors sorts the names, "10." before "2."
    era.ablate(model, block, how="slice")
    era.merge(model, block, state)
    assert_bits(model, before)


def test_a_configuration_that_models_share():
    """Another model of the same configuration stays as wide as it is, and what is inside the model follows."""
    model, other = model_zoo.build("llama"), model_zoo.build("llama")
    other.config = model.config
    width = model.config.intermediate_size
    block = era.expand(model, ADDED)
    assert other.config.intermediate_size == width
    assert model.config.intermediate_size == width + ADDED
    assert model.model.config is model.config
    assert model.model.layers[0].self_attn.config is model.config
    era.contract(model, block)
    assert model.config.intermediate_size == width


def test_an_optimizer_of_another_model_is_refused():
    """Its momentum would go on untouched, and bring back what was taken out."""
    model, other = Own(), Own()
    optimizer = torch.optim.AdamW(other.parameters())
    before, message = bits(model), "optimizer: got AdamW of none of the parameters of the Own, expected"
    with pytest.raises(ValueError, match=message):
        era.expand(model, 4, optimizer=optimizer)
    with pytest.raises(ValueError, match=message):
        era.ablate(model, Block.units(model, 4), optimizer=optimizer)
    assert_bits(model, before)
    routed = route(model_zoo.build("llama"), sgtm(model_zoo.build("llama").config, forget_units=4))
    with pytest.raises(ValueError, match="optimizer: got AdamW of none of the parameters of the Llama"):
        routed_models.ablate(routed, 0, optimizer=optimizer)
