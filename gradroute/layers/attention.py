"""RoutedAttention: self-attention between four linear layers, with routed gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..arguments import check_bool, check_int, check_number
from ..attention import AttentionSites, routed_attention
from ..backends import check_backend
from ..checks import check_shape, unrouted
from ..linear import LinearSites
from ..routes import Routes
from .children import call_linear, check_whole
from .module import Device
from .projections import ProjectionSites, check_sites, widths
from .submodules import NO_FEATURES, LinearsModule, check_no_dropout, features

if TYPE_CHECKING:
    from typing_extensions import Self


class RoutedAttention(LinearsModule):
    """Self-attention with routed gradients: `gradroute.routed_attention` between four linear layers.

    Submodules q_proj, k_proj, v_proj and o_proj, as in Llama. The update sites route their parameters, as SGTM does
    (arXiv 2512.05648): `update_q` the rows of q_proj, `update_kv` those of k_proj and v_proj, with their biases,
    `update_out` the columns of o_proj, each by head. The other sites mask attention itself (arXiv 2410.04332).

    Args:
        d_model: width of the input and the output.
        heads: H, the number of query heads.
        kv_heads: G, the number of key and value heads, a divisor of H; default: H.
        head_dim: D, the width of a head; default: d_model / H.
        sites: where to mask. Where G < H, `update` needs `update_kv` beside it.
        causal: a query sees no later key.
        window: key j is visible only if i - j < window (and j - i < window when not causal).
        scale: what scores are multiplied by; default: 1/√D.
        dropout: the share of probabilities that are dropped, in training mode only.
        bias: whether the linear layers have a bias.
        device: the parameters' device.
        dtype: the parameters' dtype.
        backend: see `gradroute.use_backend`.

    Raises:
        TypeError: sites of another layer.
        ValueError: numbers of heads or features that do not fit together; a table that does not fit the layer,
            `update` without `update_kv` where G < H, or `update_output_bias` without a bias.
    """

    sites_type = AttentionSites
    names = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __init__(
        self,
        d_model: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        sites: AttentionSites | None = None,
        causal: bool = True,
        window: int | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        _check_heads(heads, kv_heads)
        d_model, bias = check_int("d_model", d_model, 1), check_bool("bias", bias)
        self.head_dim = (
            _head_dim(d_model, heads, "d_model") if head_dim is None else check_int("head_dim", head_dim, 1)
        )
        _check_options(causal, window, scale, dropout)
        self.heads, self.kv_heads = heads, kv_heads
        self.causal, self.window, self.scale, self.dropout = causal, window, scale, dropout
        self.backend = check_backend(backend)
        for name, (outputs, inputs) in zip(self.names, self._shapes(d_model), strict=True):
            self.add_module(name, nn.Linear(inputs, outputs, bias, device, dtype))
        self.sites = sites

    @classmethod
    def from_projections(
        cls,
        module: nn.Module,
        heads: int,
        kv_heads: int | None = None,
        sites: AttentionSites | None = None,
        *,
        names: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
        causal: bool = True,
        window: int | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        backend: str | None = None,
    ) -> Self:
        """Routed attention that shares the linear submodules of `module` under their names, and so has its keys.

        The forward of `module` must be that of the layer: four linear layers and attention, nothing else. Its hooks are
        not copied; those of the submodules run, because a submodule that has some is called.

        Args:
            module: the existing module.
            heads: H, its number of query heads.
            kv_heads: G, its number of key and value heads; default: H.
            sites: where to mask.
            names: its projections of the query, the key, the value and the output.
            causal: see the constructor.
            window: see the constructor.
            scale: see the constructor.
            dropout: see the constructor.
            backend: see `gradroute.use_backend`.

        Raises:
            TypeError: a submodule is not a torch.nn.Linear itself but, say, a LoRA or quantised one.
            ValueError: `module` has other parameters or dropout, shapes do not fit, or a table does not.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        instead = "call such modules, with gradroute.routed_attention between them"
        layer._take_linears("module", module, names, instead)
        check_no_dropout("module", module, "give that of the probabilities as dropout=, and set p = 0")
        kv_heads = heads if kv_heads is None else kv_heads
        _check_heads(heads, kv_heads)
        _check_options(causal, window, scale, dropout)
        query = layer._linears()[0]
        layer.head_dim = _head_dim(query.out_features, heads, f"the outputs of {layer.names[0]}")
        layer.heads, layer.kv_heads = heads, kv_heads
        layer._check_linears("names")
        layer.causal, layer.window, layer.scale, layer.dropout = causal, window, scale, dropout
        layer.backend = check_backend(backend)
        layer.sites = sites
        return layer

    def _shapes(self, d_model: int) -> list[tuple[int, int]]:
        """The shapes of the linear layers' weights."""
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [(q_width, d_model), (kv_width, d_model), (kv_width, d_model), (d_model, q_width)]

    def _check_linears(self, argument: str) -> None:
        """Raises unless the layers fit together; the message names `argument`."""
        got = [features(linear) for linear in self._linears()]
        shapes = self._shapes(got[0][1])
        if got == shapes:
            return
        for name, one, expected in zip(self.names, got, shapes, strict=True):
            if one != expected and NO_FEATURES not in (one, got[0]):
                raise ValueError(
                    f"{argument}: got {name} of shape {list(one)}, expected {list(expected)}: "
                    f"{self.names[0]} is {list(got[0])}, with {self.heads} heads and "
                    f"{self.kv_heads} key and value heads"
                )

    def _sites_of_ops(self, sites: AttentionSites) -> ProjectionSites:
        check_sites(sites, self.heads, self.kv_heads, self._output_bias())
        return ProjectionSites.of(sites, self.head_dim)

    def _output_bias(self) -> int | str:
        output = self._linears()[-1]
        has_bias = getattr(output, "bias", None) is not None
        return features(output)[0] if has_bias else f"{self.names[-1]} has no bias"

    def forward(
        self,
        x: Tensor,
        routes: Routes | None = None,
        *,
        rotate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        cu_seqlens: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """x `[B, S, d_model]` → `[B, S, d_model]`.

        Args:
            x: the input.
            routes: the routes of the tokens `[B, S]`; None: the ordinary layer.
            rotate: what positions do to q `[B, H, S, D]` and k `[B, G, S, D]`, such as RoPE.
            cache: for inference: turns the new k and v `[B, G, S, D]` into all of them, `[B, G, S_k, D]`.
            cu_seqlens: `[documents + 1]` int32, ascending from 0 to S, for a batch of one: attention stays inside
                documents.
            key_mask: `[B, S_k]` bool; False keys are padding.
        """
        self._check_linears(type(self).__name__)
        check_shape("x", x, -1, -1, features(self._linears()[0])[1])
        if not unrouted(routes, self._sites, AttentionSites):
            assert routes is not None
            self._check_routes(x, routes)
        q_sites, kv_sites, out_sites, sites = self._op_sites or (None,) * 4
        q_proj, k_proj, v_proj, o_proj = self.names
        q = self._by_head(q_proj, self.heads, x, routes, q_sites)
        k = self._by_head(k_proj, self.kv_heads, x, routes, kv_sites)
        v = self._by_head(v_proj, self.kv_heads, x, routes, kv_sites)
        if rotate is not None:
            q, k = rotate(q, k)
        if cache is not None:
            k, v = cache(k, v)
        z = routed_attention(
            q,
            k,
            v,
            routes,
            sites,
            self.causal,
            self.window,
            self.scale,
            cu_seqlens,
            key_mask,
            self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return call_linear(self, o_proj, z.transpose(1, 2).flatten(2), routes, out_sites)

    def _check_routes(self, x: Tensor, routes: Routes) -> None:
        routes.check(x, "x")
        self._sites.check(routes, widths(routes.num_routes, self.heads, self.kv_heads, self._output_bias()))

    def _by_head(
        self, name: str, heads: int, x: Tensor, routes: Routes | None, sites: LinearSites | None
    ) -> Tensor:
        """The output of a projection, `[B, heads, S, D]`."""
        y = call_linear(self, name, x, routes, sites)
        masks = None if routes is None or not self._op_sites else self._op_sites[-1]
        check_whole(self, name, y, heads * self.head_dim, masks)
        return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def extra_repr(self) -> str:
        names = ("heads", "kv_heads", "head_dim", "causal", "window", "scale", "dropout")
        options = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        return f"{options}, {super().extra_repr()}"


def _check_options(causal: bool, window: int | None, scale: float | None, dropout: float) -> None:
    check_bool("causal", causal)
    check_int("window", window, 1, optional=True)
    check_number("scale", scale, optional=True)
    check_number("dropout", dropout, 0, 1)


def _check_heads(heads: int, kv_heads: int) -> None:
    check_int("heads", heads, 1)
    check_int("kv_heads", kv_heads)
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"kv_heads: got {kv_heads}, expected a divisor of heads = {heads}")


def _head_dim(features: int, heads: int, what: str) -> int:
    if features < heads or features % heads:
        raise ValueError(f"heads: got {heads}, expected a divisor of {what}, {features}")
    return features // heads
