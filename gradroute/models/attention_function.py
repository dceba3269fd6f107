"""The function "gradroute" of transformers' AttentionInterface, and the forms of its masks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from ..attention import AttentionSites, routed_attention
from ..routes import Routes
from .modules import AnyModule, Argument

#: The function's name in transformers' AttentionInterface and AttentionMaskInterface.
NAME = "gradroute"


def attention_forward(
    module: AnyModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    routes: Routes | None = None,
    sites: AttentionSites | None = None,
    cu_seq_lens_q: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Argument,
) -> tuple[Tensor, None]:
    """`gradroute.routed_attention` as transformers calls attention functions; without routes, its "sdpa".

    Args:
        module: the attention module.
        query: `[B, H, S, D]`.
        key: `[B, G, S, D]`.
        value: `[B, G, S, D]`.
        attention_mask: with routes `[B, 1, 1, S]` bool, False where a key is padding, or of one element: no padding.
        dropout: the share of probabilities that are dropped.
        scaling: what scores are multiplied by.
        sliding_window: a key is visible only if i - j < sliding_window.
        routes: the batch's routes.
        sites: where attention masks.
        cu_seq_lens_q: `[documents + 1]` int32 over the flattened batch: attention stays inside documents.
        is_causal: default: the module's.
        kwargs: as "sdpa" takes them; with routes those that change attention are refused.

    Returns:
        `[B, S, H, D]`, and None for the probabilities.

    Raises:
        ValueError: with routes, an arbitrary mask, soft-capping or attention sinks.
    """
    if routes is None:
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return _sdpa()(module, query, key, value, attention_mask, **options, **kwargs)
    _refuse_options(kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    key_mask = key_mask_of(attention_mask, query, key)
    batch, _, tokens, _ = query.shape
    if cu_seq_lens_q is not None and batch > 1:  # rows become one: documents end where rows do
        query, key, value = (t.transpose(0, 1).flatten(1, 2)[None] for t in (query, key, value))
        key_mask = None if key_mask is None else key_mask.reshape(1, -1)
        routes = routes.reshape(1, -1)
    z = routed_attention(
        query,
        key,
        value,
        routes,
        sites,
        causal,
        sliding_window,
        scaling,
        cu_seq_lens_q,
        key_mask,
        dropout,
        backend=getattr(module, "backend", None),
    )
    return z.transpose(1, 2).unflatten(1, (-1, tokens)).flatten(0, 1), None


def _refuse_options(options: dict[str, Argument]) -> None:
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ValueError(f"{name}: got a value, expected None: routed attention has no {name}")


def key_mask_of(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:  # [B, S] bool
    """The keys that a mask made by `structured_mask` lets be seen; None: all."""
    if mask is None or mask.numel() == 1:
        return None
    if mask.dtype != torch.bool or mask.shape != (query.shape[0], 1, 1, key.shape[2]):
        raise ValueError(
            f"attention_mask: got {mask.dtype} {list(mask.shape)}, expected a padding mask [B, S]: routed attention "
            "has no arbitrary masks"
        )
    return mask[:, 0, 0]


def structured_mask(attention_mask: Tensor | None, tokens: tuple[int, ...], device: torch.device) -> Tensor:
    """A padding mask `[B, S]` as `[B, 1, 1, S]` bool, or one True where nothing is padding.

    Models of transformers hand a mask of four dimensions on as it is, so that none of `[B, 1, S, S]` is made.

    Raises:
        ValueError: a mask that is not one of padding.
    """
    if attention_mask is None:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    if not isinstance(attention_mask, Tensor) or tuple(attention_mask.shape) != tokens:
        shape = list(getattr(attention_mask, "shape", ())) or type(attention_mask).__name__
        raise ValueError(
            f"attention_mask: got {shape}, expected a padding mask {list(tokens)}: routed attention has no arbitrary "
            "masks"
        )
    visible = attention_mask.to(device=device, dtype=torch.bool)
    if not torch.compiler.is_compiling() and bool(visible.all()):
        return structured_mask(None, tokens, device)
    return visible[:, None, None, :]


def document_bounds(position_ids: Tensor, tokens: tuple[int, ...]) -> Tensor | None:  # [documents + 1] int32
    """The bounds of documents in the flattened batch, if positions say that rows hold several; else None."""
    if torch.compiler.is_compiling():
        raise ValueError(
            "position_ids: got positions under torch.compile, where documents cannot be counted; give their bounds as "
            "cu_seq_lens_q, as RouteCollator(packed=True) does, or no position_ids"
        )
    positions = position_ids.expand(tokens)
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions.diff(dim=-1) != 1
    if int(begins.sum()) == tokens[0]:
        return None
    bounds = begins.flatten().nonzero().flatten()
    return torch.cat((bounds, bounds.new_tensor([positions.numel()]))).to(torch.int32)


def register() -> None:
    """Makes "gradroute" an attention implementation of transformers, if that was imported.

    Its mask function is that of "sdpa": a function without one would be given no padding mask at all.
    """
    if "transformers" in sys.modules:
        transformers = importlib.import_module("transformers")
        masking = importlib.import_module("transformers.masking_utils")
        transformers.AttentionInterface.register(NAME, attention_forward)
        transformers.AttentionMaskInterface.register(NAME, masking.sdpa_mask)


def _sdpa() -> Callable[..., tuple[Tensor, None]]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward
