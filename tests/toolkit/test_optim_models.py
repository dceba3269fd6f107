"""routed_param_groups: the blocks of a routed model's parameters in every architecture, and what it keeps."""

import copy

import pytest
import torch
from optim_cases import MOMENTS, parameters_of, same
from torch import nn

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
    for optimizer_class in (torch.optim.AdamW, RoutedAdamW):
        model = copy.deepcopy(base)
        if optimizer_class is RoutedAdamW:
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
            if optimizer_class is RoutedAdamW:
                assert same(part, before[name]), name
            else:
                assert (part != before[name]).float().mean() > 0.99, name
        for name, p in model.named_parameters():
            if optimizer_class is RoutedAdamW and name in before:
                state = optimizer.state[p]
                steps = forget_part(name, state["step"].expand_as(p), llama)
                assert (steps == (3 if what == "moments" else 0)).all()
                assert (state["step"] >= 3).any()
                for moment, kept in zip(MOMENTS, states.get(name, []), strict=False):
                    assert same(forget_part(name, state[moment], llama), kept)


def test_negative_weights_touch():
    """Negative weights unlearn (ERA's negative learning rate), and give gradients like any other."""
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


def block_dims(model, **options):
    """The `block_dim` of each parameter, by its name."""
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
        (MLPSites(update_out=UNITS, output=WIDTH), 0),  # 6 of 8 rows against 5 of 6 columns
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
        ),  # neither layer masks what the other one masks
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
    """The elements of the forget part by hand, a bool tensor for each parameter that SGTM confines."""
    layout = zoo.LAYOUTS[name]
    key_heads = FORGET_HEADS // (zoo.HEADS // layout.kv_heads)
    query = last(zoo.HEADS, FORGET_HEADS).repeat_interleave(layout.head_dim)
    key = last(layout.kv_heads, key_heads).repeat_interleave(layout.head_dim)
    rows = {"separate": [query, key, key], "fused": [torch.cat((query, key, key))]}
    rows["by_head"] = [last(zoo.HEADS, FORGET_HEADS).repeat_interleave(3 * layout.head_dim)]
    units = last(zoo.HIDDEN, FORGET_UNITS)
    masks = {}
    for i in range(len(model.get_submodule(layout.layers))):
        layer = f"{layout.layers}.{i}"
        inner = dict(
            zip((f"{layout.attention}.{part}" for part in layout.qkv), rows[layout.qkv_layout], strict=True)
        )
        inner |= dict.fromkeys(layout.inner, units.repeat(2) if layout.fused_gate else units)
        for path, mask in inner.items():
            linear = model.get_submodule(f"{layer}.{path}")
            masks[f"{layer}.{path}.weight"] = linear_mask(linear, mask[:, None])
            masks[f"{layer}.{path}.bias"] = mask
        for path, mask in ((f"{layout.attention}.{layout.output}", query), (layout.outer, units)):
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
            if p.dim() > 1:  # a key's bias has a gradient of 0, up to rounding
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
    """A is divided into columns and B into rows, as the masks of hidden units and heads are."""
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
