"""Expand, Route, Ablate: a model's parts grown, gated, ablated and taken out again (arXiv 2410.04332, section 4.2.2).

`expand` adds hidden units and heads and says which they are, as a `Block`; a plan (`gradroute.models.era`) routes
tokens to them; `ablate` takes the block's influence away, `contract` the block itself. `gate` scales a block instead,
to steer. All of them change parameters in place, and an optimizer's state with them where it is given, one parameter
after the other: memory is never more than that of the model and of its largest parameter, and of what a standard
deviation copies, 16 MB at most. Parameters may be offloaded by accelerate, or sharded by FSDP2 (all ranks must call
alike then, and each has shards and a whole parameter or two); on the meta device shapes change, and nothing is drawn.

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
