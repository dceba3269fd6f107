"""One call of an op by its values on the axes: which tokens and sizes, which tables, in which order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradroute import Routes, Table
from gradroute.tables import localize
from gradroute.testing import OPS, TABLE_KINDS, Draw, Marks, Sample, Sizes, make_table, site_names

BLOCK = 64  # features of the block of tables "block"
ORDERS = ("mixed", "sorted", "runs")
RUN_LENGTHS = (64, 512)  # tokens in a row of one route, of order "runs"

#: Two routes: "block": tokens of route 1 train the last BLOCK features alone; "refuse": they train none. Four routes:
#: "interval": each trains an interval of the features, `density` of them; "fractional": weights anywhere in [0, 1);
#: else as the tests have them.
TABLES = ("block", "refuse", "interval", "fractional", *TABLE_KINDS)
TWO_ROUTES = ("block", "refuse")

#: The sites that an axis value stands for, by op; an op that has none of them is left out.
ACTIVATION_SITES = {
    "route_grad": ("table",),
    "routed_linear": ("output",),
    **dict.fromkeys(("routed_activation", "routed_glu", "routed_mlp", "routed_gated_mlp"), ("hidden",)),
}
UPDATE_SITES = {
    "routed_linear": ("update_rows",),
    **dict.fromkeys(
        ("routed_mlp", "routed_gated_mlp", "routed_rms_norm", "routed_layer_norm", "routed_embedding"),
        ("update",),
    ),
}
SITES = ("activation", "update", "both", "all")


class Setting(NamedTuple):
    """A point on the axes.

    Attributes:
        op: its name.
        tokens, d_model, d_ff: T and the widths; the output width of a linear layer is d_ff.
        dtype: of all floating-point tensors.
        tables: one of TABLES.
        density: the share of features that "interval" leaves to a route.
        share: how many tokens are of route 1, with "block" and "refuse".
        sites: one of SITES.
        strength: None, "token" (anything in [0, 1.25)) or "scalar" (0.3).
        order: one of ORDERS, of the tokens by route.
    """

    op: str
    tokens: int
    d_model: int
    d_ff: int
    dtype: str = "float32"
    tables: str = "block"
    density: float = 0.25
    share: float = 0.037
    sites: str = "activation"
    strength: str | None = None
    order: str = "mixed"

    @property
    def axes(self) -> dict[str, Any]:
        """By name, those that mean something here."""
        axes = self._asdict()
        del axes["op"]
        if self.tables != "interval":
            del axes["density"]
        if self.tables not in TWO_ROUTES:
            del axes["share"]
        return axes

    @property
    def title(self) -> str:
        """A name that tells it from every other setting."""
        values = [f"{name} {value}" for name, value in self.axes.items() if value is not None]
        return f"{self.op}, " + ", ".join(values)

    @property
    def site_names(self) -> tuple[str, ...]:
        """The op's sites that have tables; none: the setting says nothing about this op."""
        if self.sites == "all":
            return site_names(self.op, bias=False)
        wanted = {"activation": (ACTIVATION_SITES,), "update": (UPDATE_SITES,)}
        kinds = wanted.get(self.sites, (ACTIVATION_SITES, UPDATE_SITES))
        if any(self.op not in kind for kind in kinds):
            return ()
        return tuple(site for kind in kinds for site in kind[self.op])

    def check(self) -> None:
        """Refuses values that are none, naming the axis.

        Raises:
            ValueError: with what came and what was expected.
        """
        for axis, values in {"tables": TABLES, "sites": SITES, "order": ORDERS, "op": tuple(OPS)}.items():
            if getattr(self, axis) not in values:
                raise ValueError(f"{axis}: got {getattr(self, axis)!r}, expected one of {', '.join(values)}")
        if self.op == "routed_attention":
            raise ValueError(
                "op: got 'routed_attention', which the suite attention has, with axes of its own"
            )
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(
                f"dtype: got {self.dtype!r}, expected a floating-point dtype of torch, such as bfloat16"
            )
        if self.strength not in (None, "token", "scalar"):
            raise ValueError(f"strength: got {self.strength!r}, expected token or scalar, or none")
        for axis in ("density", "share"):
            if not 0 <= getattr(self, axis) <= 1:
                raise ValueError(f"{axis}: got {getattr(self, axis)}, expected a share from 0 to 1")
        for axis in ("tokens", "d_model", "d_ff"):
            if getattr(self, axis) < 1:
                raise ValueError(f"{axis}: got {getattr(self, axis)}, expected at least 1")


def samples(setting: Setting, device: torch.device, number: int) -> list[Sample]:
    """Calls of one setting with the same routes and sites, each with other random tensors."""
    sizes = Sizes(d_model=setting.d_model, d_ff=setting.d_ff, vocabulary=setting.d_ff)
    routes, sites = make_routes(setting).to(device), make_sites(setting, sizes)
    return [
        _sample(
            setting,
            Draw(seed, _dtype(setting), device, (setting.tokens,), sizes, with_bias=False, on_device=True),
        )
        .with_routes(routes)
        .with_sites(sites)
        for seed in range(number)
    ]


def _dtype(setting: Setting) -> torch.dtype:
    return getattr(torch, setting.dtype)


def _sample(setting: Setting, draw: Draw) -> Sample:
    """The call without routes and sites."""
    op = OPS[setting.op]
    tensors = op.inputs(draw)
    # meta: the upstream gradient needs no more than the output's shape.
    shapes = {name: None if tensor is None else tensor.to("meta") for name, tensor in tensors.items()}
    keywords = op.keywords(draw, {})
    output = op.formula(Marks(None, {}), **shapes, **keywords)
    return Sample(setting.op, tensors, None, None, keywords, draw.normal(*output.shape))


def make_routes(setting: Setting) -> Routes:
    """Always the same ones; made where ids come from in training, on the host."""
    generator = torch.Generator().manual_seed(0)
    tokens = setting.tokens
    ids = _in_order(setting, _random_ids(setting, tokens, generator), generator)
    strengths = {
        None: None,
        "token": 1.25 * torch.rand(tokens, generator=generator),
        "scalar": torch.tensor(0.3),
    }
    return Routes.of(ids, num_routes(setting), strength=strengths[setting.strength])


def _random_ids(setting: Setting, number: int, generator: torch.Generator) -> Tensor:  # [number]
    if setting.tables in TWO_ROUTES:
        return (torch.rand(number, generator=generator) < setting.share).long()
    return torch.randint(num_routes(setting), (number,), generator=generator)


def _in_order(setting: Setting, ids: Tensor, generator: torch.Generator) -> Tensor:  # [T]
    if setting.order == "sorted":
        return ids.sort()[0]
    if setting.order == "runs":
        shortest, longest = RUN_LENGTHS
        number = -(-len(ids) // shortest)
        lengths = torch.randint(shortest, longest + 1, (number,), generator=generator)
        return _random_ids(setting, number, generator).repeat_interleave(lengths)[: len(ids)]
    return ids


def num_routes(setting: Setting) -> int:
    return 2 if setting.tables in TWO_ROUTES else 4


def make_sites(setting: Setting, sizes: Sizes) -> Any:
    """The op's sites; for route_grad its table."""
    op, routes = OPS[setting.op], num_routes(setting)
    widths = op.site_features(sizes, routes, False)
    made = {name: make_setting_table(setting, widths[name]) for name in setting.site_names}
    return made["table"] if setting.op == "route_grad" else op.sites_class()(**made)


def make_setting_table(setting: Setting, features: int) -> Table:
    """The table of a setting, for a site of so many features."""
    routes, kind = num_routes(setting), setting.tables
    if kind == "block":
        return localize(2, features, {1: slice(max(0, features - BLOCK), features)})
    if kind == "refuse":
        return Table([[1.0], [0.0]])
    if kind == "fractional":
        return Table(torch.rand(routes, features, generator=torch.Generator().manual_seed(0)))
    if kind == "interval":
        kept = round(setting.density * features)
        feature = torch.arange(features)
        starts = torch.arange(routes).unsqueeze(1) * features // routes
        return Table(((feature - starts) % features < kept).float())
    return make_table(kind, routes, features)
