"""Where the experts of a model's mixtures are, for `gradroute.blocks`."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from ..arguments import check_indices, check_is
from .architectures import Architecture, architecture_of, inner_model, submodule
from .experts import BatchedExperts
from .inspection import Piece
from .lora import refuse_unreadable
from .modules import AnyModule

__all__ = ["expert_pieces", "find_experts"]

# The parameters of experts, and what each is to them: they add nothing where those of role "output" are 0.
_ROLES = {
    "gate_up_proj": "input",
    "gate_up_proj_bias": "input",
    "down_proj": "output",
    "down_proj_bias": "output",
}


def find_experts(
    model: nn.Module, architecture: Architecture | None = None, layers: Collection[int] | None = None
) -> list[tuple[str, AnyModule, int]]:
    """The path of the experts of each of a model's mixtures, the experts, and how many they are.

    Args:
        model: a model of transformers, routed or not.
        architecture: where the decoder layers are; default: by the model's `config.model_type`.
        layers: the decoder layers' indices; None: all that have experts.

    Raises:
        TypeError: experts of another form, or sharded ones; no such architecture.
        ValueError: layers without experts, or none with some.
    """
    inner = inner_model(model)
    if architecture is not None:
        check_is("architecture", architecture, Architecture, "an Architecture or None")
    known = architecture_of(inner) if architecture is None else architecture
    decoders = list(submodule(inner, known.layers))
    with_experts = [i for i, decoder in enumerate(decoders) if known.layer.has_experts(decoder)]
    mixin, name = known.layer.moe_mixin, known.layer.mlp_name
    if mixin is None or not with_experts:
        raise ValueError(f"model: got a {type(inner).__name__} without mixtures of experts, expected some")
    chosen = with_experts if layers is None else check_indices("layers", layers, len(decoders))
    dense = [i for i in chosen if i not in with_experts]
    if dense:
        raise ValueError(f"layers: got {dense}, which have no experts, expected some of {with_experts}")
    paths = {module: path for path, module in inner.named_modules()}
    found = [getattr(getattr(decoders[i], name), mixin.experts_name) for i in chosen]
    for module in found:
        BatchedExperts.check_module(module)
        refuse_unreadable(paths[module], module)
    return [(paths[module], module, BatchedExperts.extents_of(module).count) for module in found]


def expert_pieces(path: str, experts: AnyModule, index: Tensor) -> tuple[Piece, ...]:
    """The parameters of some experts of a mixture."""
    count = BatchedExperts.extents_of(experts).count
    return tuple(
        Piece(f"{path}.{name}", 0, index, count, role)
        for name, role in _ROLES.items()
        if isinstance(getattr(experts, name, None), nn.Parameter)
    )
