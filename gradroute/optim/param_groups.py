"""routed_param_groups: a routed model's parameters, with the blocks that the sites of their layers mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..arguments import check_is, check_number, ordinary_tensors, shown
from ..attention import AttentionSites
from ..embedding import EmbeddingSites
from ..layers import RoutedModule
from ..linear import LinearSites
from ..mlp import MLPSites
from ..tables import Table


@ordinary_tensors()
def routed_param_groups(
    model: nn.Module,
    *,
    weight_decay: float | None = None,
    no_decay: Callable[[str, nn.Parameter], bool] | None = None,
) -> list[dict[str, Any]]:
    """The trained parameters of a routed model in groups for `RoutedAdamW`, with the `block_dim` of each.

    A parameter is divided into the blocks (see `RoutedAdamW`) that the sites of its layers mask:

    - rows (outputs) of linear layers that make hidden units, queries, keys and values, of those with `output` or
      `update_rows`, and wherever nothing says otherwise; tokens of an embedding; elements of biases and norms;
    - columns (inputs) of the output layers of an MLP (`update`, `update_out`, `forward`) and of attention (`update`,
      `update_out`, `forward_heads`), of linear layers with `update_cols`, and of an embedding whose `update` differs
      from feature to feature;
    - columns of A in LoRA adapters, which are input features, and rows of B, which are output features.

    Where both rows and columns are masked, blocks are the ones with more weights of 0 (counted in routes that mask some
    and not all of them), and rows if there are as many; elements that only the other tables mask drift in blocks that
    are touched. With rows as blocks, an embedding's tokens that a batch lacks wait, moments and all, as under lazy
    optimizers; small models train the worse for it. Where everybody trains the embedding, give it a group of its own
    with `block_dim=None`. A tied parameter has columns only if all of its layers mask them. The Conv1D of transformers
    stores its weight transposed, so that its rows are `block_dim=1`.

    Args:
        model: a model routed by `gradroute.models.route`, with adapters or without, sharded or not; or any module with
            routed layers in it. Parameters that are not routed are divided into rows.
        weight_decay: the weight decay of parameters that decay; None: all of them have that of the optimizer.
        no_decay: (name, parameter) → whether the parameter's weight decay is 0; default, where there is a
            `weight_decay`: parameters of fewer than two dimensions, which are biases and norms.

    Returns:
        Groups that hold every parameter that requires a gradient once.

    Raises:
        ValueError: `no_decay` without `weight_decay`.
    """
    check_is("model", model, nn.Module, "a torch.nn.Module")
    check_number("weight_decay", weight_decay, 0, optional=True)
    if no_decay is not None and not callable(no_decay):
        raise TypeError(f"no_decay: got {shown(no_decay)}, expected a function of a name and a parameter")
    if weight_decay is None and no_decay is not None:
        raise ValueError(
            "no_decay: got a rule beside weight_decay=None, expected the weight decay of the rest"
        )
    no_decay = _has_one_dimension if no_decay is None else no_decay
    layers = _layers_of(model)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            options: dict[str, Any] = {"block_dim": _block_dim(parameter, layers[id(parameter)])}
            if weight_decay is not None:
                options["weight_decay"] = 0.0 if no_decay(name, parameter) else weight_decay
            group = groups.setdefault(tuple(options.values()), {"params": [], **options})
            group["params"].append(parameter)
    return list(groups.values())


def _has_one_dimension(name: str, parameter: nn.Parameter) -> bool:
    return parameter.dim() < 2


class _Layer(NamedTuple):
    """The masks that a layer's sites put on its weight.

    Attributes:
        rows: the tables of the layer's outputs.
        columns: the tables of the layer's inputs.
        rows_dim: the dimension of the weight along which it is divided where nothing is masked.
    """

    rows: Sequence[Table | None] = ()
    columns: Sequence[Table | None] = ()
    rows_dim: int = 0

    def zeros(self, dim: int, size: int) -> Tensor | None:  # [R, size]
        """Which of the weight's indices along a dimension some table masks with 0, for each route; None: no table."""
        tables = [
            table for table in (self.rows if dim == self.rows_dim else self.columns) if table is not None
        ]
        zeros = [(table.weights == 0).repeat_interleave(size // table.features, dim=1) for table in tables]
        return torch.stack(zeros).any(0) if zeros else None


def _block_dim(parameter: Tensor, layers: Sequence[_Layer]) -> int:
    """The dimension along which a parameter of some layers is divided into blocks."""
    if parameter.dim() < 2:
        return 0
    rows_dim = layers[0].rows_dim
    rows, columns = (_masked_share(layers, dim, parameter.shape[dim]) for dim in (rows_dim, 1 - rows_dim))
    return rows_dim if rows >= columns else 1 - rows_dim


def _masked_share(layers: Sequence[_Layer], dim: int, size: int) -> float:
    """The share of weights that are 0 in all of a parameter's layers, in routes where some are and some are not."""
    zeros = [layer.zeros(dim, size) for layer in layers]
    found = [one for one in zeros if one is not None]
    if len(found) < len(zeros):
        return 0.0
    masked = torch.stack(found).all(0)
    return float((masked & ~masked.all(1, keepdim=True)).float().mean())


def _layers_of(model: nn.Module) -> dict[int, list[_Layer]]:
    """All layers that have a parameter, by the parameter's id."""
    modules = list(model.modules())
    known: dict[int, _Layer] = {}  # id of a module → the masks that other modules put on its weight
    for module in modules:
        if isinstance(module, RoutedModule) and isinstance(module.sites, (MLPSites, AttentionSites)):
            names: Any = module.names
            outer = getattr(module, names[-1])
            known[id(getattr(outer, "base_layer", outer))] = _outer_layer(module.sites)
        for inner in _inputs_of_adapters(module):
            known[id(inner)] = _Layer(rows_dim=1)
    layers: dict[int, list[_Layer]] = {}
    for module in modules:
        layer = known.get(id(module)) or _layer_of(module)
        layer = layer._replace(rows_dim=1) if _is_conv1d(module) else layer
        for parameter in module._parameters.values():
            layers.setdefault(id(parameter), []).append(layer)
    return layers


def _outer_layer(sites: MLPSites | AttentionSites) -> _Layer:
    """The linear layer after hidden units or heads; it reads zeros where `forward` tables zero them."""
    tables = sites.tables
    seen = tables.get("forward", tables.get("forward_heads"))
    rows = [tables.get("output")] if isinstance(sites, MLPSites) else []
    return _Layer(rows, [sites.table("update_out"), seen])


def _layer_of(module: nn.Module) -> _Layer:
    """A module as a layer whose own sites alone mask its weight."""
    sites = module.sites if isinstance(module, RoutedModule) else None
    if isinstance(sites, LinearSites):
        tables = sites.tables
        return _Layer([tables.get("output"), tables.get("update_rows")], [tables.get("update_cols")])
    if isinstance(sites, EmbeddingSites):
        return _Layer(columns=[sites.tables.get("update")])
    return _Layer()


def _inputs_of_adapters(module: nn.Module) -> Iterator[nn.Module]:
    """The matrices A of a LoRA layer's adapters, whose first dimension is the rank."""
    linears = getattr(module, "lora_A", None)
    if isinstance(linears, nn.ModuleDict):
        yield from linears.values()
    embeddings = getattr(module, "lora_embedding_A", None)
    if isinstance(embeddings, nn.ParameterDict):
        yield embeddings


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the Conv1D of transformers, or of a class that `route` or `fully_shard` made of it."""
    names = ((kind.__module__, kind.__name__) for kind in type(module).__mro__)
    return ("transformers.pytorch_utils", "Conv1D") in names
