"""Expand, Route, Ablate: a model's parts grown, gated, ablated and taken out again (arXiv 2410.04332, section 4.2.2).

`expand` adds hidden units and heads and says which they are, as a `Block`; a plan (`gradroute.models.era`) routes
tokens to them; `ablate` takes the block's influence away, `contract` the block itself. `gate` scales a block instead,
to steer. All of them change parameters in place, and an optimizer's state with them where it is given.

    block = era.expand(model, units=64, optimizer=optimizer)
    route(model, gradroute.models.era(units=64))
    ...                                    # train
    unroute(model)
    era.ablate(model, block)               # or how="slice", how="resample"
    era.contract(model, block)             # as small as it was
    era.export(model, "unlearnt")
"""

from ..blocks import Block, Units
from .ablation import ablate
from .contraction import contract, merge
from .expansion import expand
from .exporting import export
from .gating import Gate, gate

__all__ = ["Block", "Gate", "Units", "ablate", "contract", "expand", "export", "gate", "merge"]
