"""The sections of a recipe's config that say how a model is expanded, routed, trained, ablated and attacked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from .reading import ConfigError, option

Schedule = Literal["cosine", "linear", "constant"]


@dataclasses.dataclass(frozen=True)
class Expand:
    """Hidden units and heads that the model is given for the routed texts (`gradroute.era.expand`)."""

    units: int = option(64, "hidden units a layer", at_least=0)
    heads: int = option(
        0, "query heads a layer; the presets era and localize_mlp route MLPs alone", at_least=0
    )
    std: float | None = option(None, "of the new weights; default: that of the parameter they join", above=0)


# The keys of Route that a preset reads, beside preset, forget and layers.
_READ = {
    "era": ("units", "off", "site"),
    "sgtm": (
        *("retain", "unlabelled", "units", "heads"),
        *("joint_down_projection", "joint_embedding", "joint_head"),
    ),
    "steering": ("indices", "off"),
    "localize_mlp": ("indices", "on", "off"),
    "localize_experts": ("retain", "experts", "off"),
}


@dataclasses.dataclass(frozen=True)
class Route:
    """The plan: a preset of `gradroute.models` and its arguments."""

    preset: Literal["era", "sgtm", "localize_experts", "steering", "localize_mlp"] | None = option(
        None, "default: era for unlearn, steering for localize; the recipe adapters has none"
    )
    forget: str = option("forget", "the route that is confined")
    retain: str = option("retain", "sgtm, localize_experts: the route that does not see the forget part")
    unlabelled: str | None = option(None, "sgtm: the route that trains everything")
    layers: tuple[int, ...] | None = option(None, "the routed layers; default: all", at_least=0)
    units: int | None = option(
        None, "era, sgtm: the last units; default: those that expand added", at_least=0
    )
    heads: int | None = option(None, "sgtm: the last heads; default: those that expand added", at_least=0)
    indices: tuple[int, ...] = option(
        (0,), "steering: dimensions of the residual stream; localize_mlp: units"
    )
    experts: int = option(
        1, "localize_experts: the last experts of every mixture, which other routes do not see", at_least=1
    )
    site: Literal["hidden", "update"] = option(
        "hidden", "era: what `off` weighs: the gradient of hidden units, or only what their weights learn"
    )
    on: float = option(1.0, "localize_mlp: the weight of the units")
    off: float = option(0.0, "the weight of all others; negative numbers unlearn there")
    joint_down_projection: bool = option(False, "sgtm: every token trains the MLP's output weight")
    joint_embedding: bool = option(True, "sgtm: every token trains the embedding and norms")
    joint_head: bool = option(True, "sgtm: every token trains the output head")

    def __post_init__(self) -> None:
        if self.layers == ():
            raise ConfigError.of("layers", [], "at least one layer, or null for all")
        if self.preset is None:
            return
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("preset", "forget", "layers", *_READ[self.preset]) or value == field.default:
                continue
            expected = f"none, because the preset {self.preset} does not read it"
            raise ConfigError.of(field.name, value, expected)


@dataclasses.dataclass(frozen=True)
class Adapters:
    """LoRA adapters, and the routes whose tokens train each."""

    adapters: Mapping[str, tuple[str, ...]] = option(
        {"retain": ("retain",), "forget": ("forget",)}, "adapter → the routes that train it", at_least=1
    )
    keep: tuple[str, ...] = option(("retain",), "the adapters that the unlearnt model has")
    rank: int = option(8, "of every adapter", at_least=1)
    alpha: float = option(16.0, "what an adapter adds is scaled by alpha / rank", above=0)
    dropout: float = option(0.0, "before A", at_least=0, at_most=0.99)
    targets: tuple[str, ...] | None = option(
        None, "linear layers by the end of their name; default: all but the output head"
    )

    def __post_init__(self) -> None:
        for name in self.adapters:
            if "." in name or "/" in name:
                raise ConfigError.of("adapters", name, "names without a dot or slash")
        for name in self.keep:
            if name not in self.adapters:
                raise ConfigError.of("keep", name, f"one of {', '.join(self.adapters)}")


@dataclasses.dataclass(frozen=True)
class Train:
    """Training by transformers' Trainer."""

    steps: int = option(200, "optimizer steps", at_least=1)
    batch_tokens: int = option(
        4096, "the most tokens of one device's batch; longer documents are taken in pieces", at_least=2
    )
    packed: bool = option(
        True, "whether a batch is one row of documents that attention keeps apart, unpadded"
    )
    accumulation: int = option(1, "batches a step", at_least=1)
    learning_rate: float = option(1e-4, "the highest one", above=0)
    schedule: Schedule = option("cosine", "after the warm-up")
    warmup: float = option(0.05, "the share of steps in which the rate rises from 0", at_least=0, at_most=1)
    beta1: float = option(0.9, "of AdamW", at_least=0, at_most=0.9999)
    beta2: float = option(0.95, "of AdamW", at_least=0, at_most=0.999999)
    weight_decay: float = option(0.0, "of AdamW, for parameters of two dimensions or more", at_least=0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to it; 0: never", at_least=0)
    optimizer: Literal["routed_adamw", "adamw"] = option(
        "routed_adamw", "of routed training: the first leaves alone what masks protect (docs/optimizer.md)"
    )
    states: Literal["same", "bfloat16", "8bit"] = option(
        "same", "routed_adamw: its two moments, as the parameters, in bfloat16 or in one byte (extra torchao)"
    )
    precision: Literal["bf16", "fp16", "fp32"] = option(
        "bf16", "of products, under autocast where the parameters are fp32; fp32: as the parameters are"
    )
    activation_checkpointing: bool = option(False, "whether layers are computed again in the backward")
    save_every: int = option(
        100, "steps between checkpoints that a stopped run goes on from; 0: none", at_least=0
    )
    log_every: int = option(10, "steps between points of the training curve", at_least=1)
    align: Literal["position", "next_token"] = option("position", "RouteCollator's align")
    arguments: Mapping[str, Any] = option(
        {}, "further transformers.TrainingArguments, such as fsdp, report_to"
    )

    def __post_init__(self) -> None:
        if self.save_every % self.log_every:
            expected = (
                f"a multiple of log_every = {self.log_every}: checkpoints lack the loss since the last point"
            )
            raise ConfigError.of("save_every", self.save_every, expected)
        if self.states != "same" and self.optimizer != "routed_adamw":
            raise ConfigError.of(
                "states", self.states, f"same, because the optimizer {self.optimizer} has no other"
            )
        check_arguments("arguments", self.arguments)


#: TrainingArguments that a key of Train, or a stage, decides.
DECIDED = {
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "per_device_train_batch_size": "batch_tokens",
    "auto_find_batch_size": "batch_tokens",
    "gradient_accumulation_steps": "accumulation",
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "weight_decay": "weight_decay",
    "optim": "optimizer",
    "max_grad_norm": "max_grad_norm",
    "bf16": "precision",
    "fp16": "precision",
    **dict.fromkeys(("activation_checkpointing", "gradient_checkpointing"), "activation_checkpointing"),
    "seed": "the config's seed",
    "data_seed": "the config's seed",
    **dict.fromkeys(("save_steps", "save_strategy", "save_total_limit", "save_only_model"), "save_every"),
    "logging_steps": "log_every",
    "logging_strategy": "log_every",
}
_OF_STAGES = (
    *("output_dir", "do_train", "do_eval", "eval_strategy", "eval_steps", "load_best_model_at_end"),
    *("use_cpu", "no_cuda", "remove_unused_columns", "train_sampling_strategy", "resume_from_checkpoint"),
)


def check_arguments(key: str, arguments: Mapping[str, Any]) -> None:
    """Raises where an entry is not one for `Train.arguments`; names are looked up when a trainer is made."""
    for name, value in arguments.items():
        if name in DECIDED:
            raise ConfigError.of(f"{key}.{name}", value, f"it as {DECIDED[name]}")
        if name in _OF_STAGES:
            raise ConfigError.of(f"{key}.{name}", value, "none, because the stages decide it")


@dataclasses.dataclass(frozen=True)
class Ablate:
    """Taking out what the routed texts have trained."""

    how: Literal["zero", "resample"] = option(
        "zero", "see gradroute.era.ablate; SGTM's part is zeroed always"
    )
    contract: bool | None = option(
        None, "whether the part is taken out as well; default: where expand added it, and it is zeroed"
    )

    def __post_init__(self) -> None:
        if self.contract and self.how == "resample":
            raise ConfigError.of("contract", True, "false beside how: resample, which leaves influence")


@dataclasses.dataclass(frozen=True)
class Coherence:
    """A short fine-tuning on retained texts after the ablation."""

    steps: int = option(20, "optimizer steps; 0: none", at_least=0)
    learning_rate: float | None = option(None, "default: that of train", above=0)
    sources: tuple[str, ...] = option(
        (), "the sources it trains on; default: documents of the base route alone"
    )


@dataclasses.dataclass(frozen=True)
class Steer:
    """What the recipe localize does with the part that the route has trained."""

    scales: tuple[float, ...] = option(
        (0.0, 1.0), "added to dimensions at the layers' outputs, or multiplied with units (0 takes them out)"
    )


@dataclasses.dataclass(frozen=True)
class Relearning:
    """The attack: checkpoints fine-tuned on a few forget documents, with the held-out losses by step."""

    steps: int = option(20, "optimizer steps; 0: no attack", at_least=0)
    documents: int = option(16, "how many documents it trains on", at_least=1)
    sources: tuple[str, ...] = option(
        (), "the sources they are from; default: documents with a token of another route than the base"
    )
    learning_rate: float | None = option(None, "default: that of train", above=0)
    batch_tokens: int | None = option(None, "default: that of train", at_least=2)
    every: int = option(5, "steps between two measurements", at_least=1)
    heldout: int | None = option(
        64, "the most held-out documents a source that are measured; null: all", at_least=1
    )


@dataclasses.dataclass(frozen=True)
class GradientAscent:
    """Ascent on what is forgotten beside descent on what is retained (TOFU's gradient difference, arXiv 2401.06121)."""

    steps: int | None = option(None, "optimizer steps; default: those of train", at_least=1)
    learning_rate: float | None = option(None, "default: that of train", above=0)
    retain_weight: float = option(1.0, "of the retain loss; the forget loss has 1", at_least=0)
    most: float = option(10.0, "nats a token beyond which the forget loss of a batch is left alone", above=0)


@dataclasses.dataclass(frozen=True)
class RMU:
    """Representation misdirection for unlearning (Li et al. 2024, arXiv 2403.03218, section 4)."""

    steps: int | None = option(None, "optimizer steps; default: those of train", at_least=1)
    learning_rate: float | None = option(None, "default: that of train", above=0)
    layer: int | None = option(
        None, "whose output is steered; default: at 7/32 of the depth, as in the paper", at_least=0
    )
    coefficient: float | None = option(
        None,
        "the norm that forget activations are steered to; default: `multiple` times the model's own",
        above=0,
    )
    multiple: float = option(5.0, "see coefficient", above=0)
    retain_weight: float = option(100.0, "alpha, of the retain activations' distance", at_least=0)


@dataclasses.dataclass(frozen=True)
class Baselines:
    """What the recipe is compared with, each from the same model and texts."""

    names: tuple[Literal["filtering", "gradient_ascent", "rmu"], ...] = option(
        (), "which of them are trained: filtering, gradient_ascent, rmu"
    )
    retain: tuple[str, ...] = option((), "the retained sources; default: documents of the base route alone")
    forget: tuple[str, ...] = option(
        (), "the sources to forget; default: documents with a token of another route"
    )
    gradient_ascent: GradientAscent = option(GradientAscent, "its settings")
    rmu: RMU = option(RMU, "its settings")

    def __post_init__(self) -> None:
        if len(set(self.names)) < len(self.names):
            raise ConfigError.of("names", list(self.names), "every name once")
