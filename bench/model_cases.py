"""The Llama that the suite `model` times, its batch, and the ways to train it, routed and not."""

import copy
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradroute.models import localize_mlp, route, sgtm
from gradroute.tables import localize

from .cases import Step
from .rivals import LIGER_MISSING

# Routed backwards round as often as plain PyTorch, at other places; gradroute.testing allows the same.
TIMES_PLAIN = 2.0
# Liger's fused head and loss sum up gradients of the head, chunk by chunk, in the model's dtype.
TIMES_PLAIN_OF_LIGER = 8.0

FORGET = 1  # the route whose tokens are confined; all other tokens have route 0


class Shape(NamedTuple):
    """A Llama, and the tokens of one training step.

    Attributes:
        batch, length: B and S.
        layers, d_model, d_ff, heads, kv_heads, vocabulary: the model's sizes.
        units: the last hidden units of every MLP, to which the confined tokens are routed; with SGTM they have as many
            query heads as share a key and value head.
        forget_share: the share of tokens that are confined, in one document a row.
    """

    batch: int
    length: int
    layers: int
    d_model: int
    d_ff: int
    heads: int
    kv_heads: int
    vocabulary: int
    units: int = 64
    forget_share: float = 0.037

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads

    @property
    def forget_heads(self) -> int:
        return self.heads // self.kv_heads


# On CUDA: Llama 3.2 1B but for its vocabulary of 128256: the logits of one step would be 8 GB in fp32, and the loss
# needs them three times.
SHAPES = {
    "cpu": Shape(batch=4, length=512, layers=4, d_model=256, d_ff=1024, heads=4, kv_heads=2, vocabulary=4096),
    "cuda": Shape(
        batch=4, length=4096, layers=16, d_model=2048, d_ff=8192, heads=32, kv_heads=8, vocabulary=32000
    ),
}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


class Batch(NamedTuple):
    """Tokens, which are their own labels, and their routes, which stay on the host: both `[B, S]`."""

    input_ids: Tensor
    route_ids: Tensor

    def rows(self) -> Iterator["Batch"]:
        """A batch of every row alone."""
        for row in range(len(self.input_ids)):
            yield Batch(*(ids[row : row + 1] for ids in self))


def make_batch(shape: Shape, device: torch.device, seed: int = 0) -> Batch:
    """Random tokens; in every row one document of confined tokens, anywhere."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(shape.vocabulary, (shape.batch, shape.length), generator=generator)
    confined = round(shape.forget_share * shape.length)
    starts = torch.randint(shape.length - confined + 1, (shape.batch, 1), generator=generator)
    since = torch.arange(shape.length) - starts  # [B, S]
    route_ids = ((since >= 0) & (since < confined)).long() * FORGET
    return Batch(input_ids.to(device), route_ids)


def transformers() -> ModuleType:
    return importlib.import_module("transformers")


def make_model(shape: Shape, device: torch.device) -> nn.Module:
    """A Llama with random weights, from a configuration alone, without the hub."""
    config = transformers().LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.length,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return made_of(config, device)


def made_of(config: Any, device: torch.device) -> nn.Module:
    """A model of transformers with random weights, in training mode."""
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers().AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[device.type], attn_implementation="sdpa"
        )
    return model.train()


def with_shared_weights(model: nn.Module) -> nn.Module:
    """A copy of a model's modules around the same parameters."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


Loss = Callable[[Batch], Tensor]
Objective = Callable[[nn.Module, Batch], Tensor]


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss as transformers computes it."""
    return model(input_ids=batch.input_ids, labels=batch.input_ids).loss


def unrouted(model: nn.Module, shape: Shape, objective: Objective = own_loss) -> Loss:
    return lambda batch: objective(model, batch)


def detach_hidden(model: nn.Module, shape: Shape, objective: Objective = own_loss) -> Loss:
    """`m*h + (1-m)*h.detach()` at the hidden units of every MLP, by hooks; one dense mask a batch serves all layers."""
    table = localize(2, shape.d_ff, {FORGET: slice(shape.d_ff - shape.units, shape.d_ff)}).weights
    masks: dict[str, Tensor] = {}

    def masked(module: nn.Module, arguments: tuple[Tensor]) -> Tensor:
        (h,) = arguments  # [B, S, d_ff]
        m = masks["hidden"]
        return m * h + (1 - m) * h.detach()

    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(masked)

    def loss(batch: Batch) -> Tensor:
        masks["hidden"] = table.to(model.device, model.dtype)[batch.route_ids.to(model.device)]
        value = objective(model, batch)
        masks.clear()  # autograd keeps those that backward needs
        return value

    return loss


class Confined(NamedTuple):
    """The forget part of a model, by the last part of a module's name.

    Attributes:
        rows: how many of a weight's last rows the confined tokens update; they update no others.
        columns: how many of a weight's last columns they update; likewise.
        unseen: how many of the last features at a module's input only the confined tokens see.
    """

    rows: dict[str, int]
    columns: dict[str, int]
    unseen: dict[str, int]


def confined_by_sgtm(shape: Shape) -> Confined:
    query, key = (shape.head_dim * heads for heads in (shape.forget_heads, 1))
    rows = {"q_proj": query, "k_proj": key, "v_proj": key, "gate_proj": shape.units, "up_proj": shape.units}
    columns = {"o_proj": query, "down_proj": shape.units}
    return Confined(rows, columns, unseen=columns)


def detach_sgtm(model: nn.Module, shape: Shape, objective: Objective = own_loss) -> Loss:
    """SGTM for each token by hooks, see `detach_confined`."""
    return detach_confined(model, confined_by_sgtm(shape), objective)


def detach_confined(model: nn.Module, confined: Confined, objective: Objective) -> Loss:
    """SGTM for each token by hooks: products with 0 or 1 in forward; weights that are detached but for the forget part.

    A parameter has one gradient for all tokens, so the detach idiom needs a second product for the confined tokens'.
    """
    masks: dict[str, Tensor] = {}

    def hidden_from_others(name: str) -> Callable[..., Tensor]:
        return lambda module, arguments: arguments[0] * masks[name]

    def confined_to(weight_of: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda module, arguments, output: torch.where(
            masks["forget"], F.linear(arguments[0], weight_of(module.weight)), output
        )

    features = {}
    for full_name, module in model.named_modules():
        name = full_name.rpartition(".")[2]
        if name in confined.unseen:
            features[name] = module.in_features
            module.register_forward_pre_hook(hidden_from_others(name))
        if name in confined.columns:
            last = confined.columns[name]
            module.register_forward_hook(confined_to(lambda w, n=last: last_trained(w.mT, n).mT))
        if name in confined.rows:
            module.register_forward_hook(confined_to(lambda w, n=confined.rows[name]: last_trained(w, n)))

    def loss(batch: Batch) -> Tensor:
        masks["forget"] = forget = batch.route_ids.to(model.device).unsqueeze(-1) == FORGET  # [B, S, 1]
        for name, last in confined.unseen.items():
            seen = torch.arange(features[name], device=forget.device) < features[name] - last
            masks[name] = (forget | seen).to(model.dtype)  # [B, S, features]
        value = objective(model, batch)
        masks.clear()
        return value

    return loss


def last_trained(weight: Tensor, rows: int) -> Tensor:
    """The same weight, of which only the last rows have a gradient."""
    if rows == 0:
        return weight.detach()
    return torch.cat((weight[:-rows].detach(), weight[-rows:]))


#: The meanings that a variant may have, with each of them in plain PyTorch.
BY_HAND: dict[str, Callable[..., Loss]] = {
    "unrouted": unrouted,
    "hidden units": detach_hidden,
    "SGTM": detach_sgtm,
}


class Training(NamedTuple):
    """One way to train the model.

    Attributes:
        meaning: the name in BY_HAND of what it computes.
        loss: a batch → its loss, differentiable.
        same_losses: further losses, which must be that of the unrouted model bit for bit.
        times_plain: its gradients may have so many times the error of BY_HAND.
        is_rival: whether its failure is a finding about others' code, not a failure of the run.
    """

    meaning: str
    loss: Loss
    same_losses: tuple[Loss, ...] = ()
    times_plain: float = TIMES_PLAIN
    is_rival: bool = False

    def step(self, batch: Batch, optimizer: torch.optim.Optimizer) -> Step:
        """One training step; no gradient is left behind."""

        def run() -> None:
            self.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()

        return run


def trainings(model: nn.Module, shape: Shape) -> tuple[dict[str, Training], dict[str, str]]:
    """The ways to train by name, around the same parameters; and those that are missing here, with the reason."""
    made = {
        "unrouted": Training("unrouted", unrouted(model, shape), is_rival=True),
        "routed, hidden units": routed_hidden(with_shared_weights(model), shape),
        "routed, SGTM": routed_sgtm(with_shared_weights(model), shape),
    }
    for meaning in ("hidden units", "SGTM"):
        loss = BY_HAND[meaning](with_shared_weights(model), shape)
        made[f"detach, {meaning}"] = Training(meaning, loss, is_rival=True)
    if LIGER_MISSING is not None:
        return made, {"Liger": LIGER_MISSING}
    loss = liger(with_shared_weights(model))
    made["Liger"] = Training("unrouted", loss, times_plain=TIMES_PLAIN_OF_LIGER, is_rival=True)
    return made, {}


def routed_loss(model: nn.Module) -> Loss:
    return lambda batch: (
        model(input_ids=batch.input_ids, labels=batch.input_ids, route_ids=batch.route_ids).loss
    )


def routed_hidden(model: nn.Module, shape: Shape) -> Training:
    plan = localize_mlp(range(shape.layers), slice(shape.d_ff - shape.units, shape.d_ff), route=FORGET)
    loss = routed_loss(route(model, plan))
    return Training("hidden units", loss, same_losses=(loss, unrouted(model, shape)))


def routed_sgtm(model: nn.Module, shape: Shape) -> Training:
    plan = sgtm(model.config, shape.forget_heads, shape.units, forget=FORGET)
    loss = routed_loss(route(model, plan))
    return Training("SGTM", loss, same_losses=(unrouted(model, shape),))


def liger(model: nn.Module) -> Loss:
    """Liger's kernels, its fused head and loss among them, which never make all logits; patched at the first loss.

    It patches the model's instance, and the module that defines Llama only for the time of its forward.
    """
    modeling = sys.modules["transformers.models.llama.modeling_llama"]

    @functools.cache
    def patches() -> dict[str, object]:
        before = dict(vars(modeling))
        try:
            importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_llama(model=model)
            return {name: vars(modeling)[name] for name in before if vars(modeling)[name] is not before[name]}
        finally:
            vars(modeling).update(before)

    def loss(batch: Batch) -> Tensor:
        with replaced(modeling, patches()):
            return own_loss(model, batch)

    return loss


@contextmanager
def replaced(module: ModuleType, values: Mapping[str, object]) -> Iterator[None]:
    """A context in which a module's attributes have other values."""
    before = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW with its state, at a rate so small that the model hardly changes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def warm_step_on_cpu(shape: Shape, name: str) -> Step:
    """A step after a short one, so that what is loaded once is not counted."""
    device = torch.device("cpu")
    model = make_model(shape, device)
    training, optimizer = trainings(model, shape)[0][name], make_optimizer(model)
    short = shape._replace(length=min(64, shape.length))
    training.step(make_batch(short, device), optimizer)()
    return training.step(make_batch(shape, device), optimizer)
