"""Models that FSDP2 manages: their parameters as shards again, and others of another shape in the place of those."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def reshard(model: nn.Module) -> None:
    """Makes the parameters of a model that FSDP2 manages shards again, as they are not after some forwards.

    What is written to a parameter while it is whole would be lost with it.
    """
    for module in _managing(model):
        module.reshard()


def is_managed(model: nn.Module, parameter: Tensor) -> bool:
    """Whether FSDP2 shards a parameter, and nothing else does, so that `replace_managed` can change its shape."""
    return any(
        managed.sharded_param is parameter and not getattr(managed, "is_dtensor", True)
        for group in _groups(model)
        for managed in group.fsdp_params
    )


def replace_managed(model: nn.Module, parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    """Puts values of another shape, which every rank has whole, in the place of a parameter that FSDP2 manages.

    FSDP2 has no public way to do that: what it records of a parameter is made anew, as `fully_shard` makes it.

    Returns:
        The new parameter, a DTensor, which is in the model's modules already.
    """
    for group in _groups(model):
        for i, managed in enumerate(group.fsdp_params):
            if managed.sharded_param is parameter:
                group.fsdp_params[i] = made = _made_anew(managed, group, values)
                return made.sharded_param
    raise AssertionError("is_managed() was asked before")


def _made_anew(managed: Any, group: Any, values: Tensor) -> Any:
    """FSDP2's record of one parameter, for other values."""
    parameter = nn.Parameter(values.contiguous(), managed.sharded_param.requires_grad)
    placement = managed.fsdp_placement
    managed._post_load_hook_handle.remove()
    made = type(managed)(
        parameter,
        managed._module_info,
        managed.mesh_info,
        managed.post_forward_mesh_info,
        managed.device,
        lambda _: placement,
        managed.mp_policy,
        group.offload_policy,
    )
    made._param_fqn = managed._param_fqn
    if hasattr(managed, "orig_dtype"):  # set in the first forward
        made.init_dtype_attrs(managed.mp_policy)
    return made


def _groups(model: nn.Module) -> Iterator[Any]:
    """FSDP2's groups of parameters that it gathers together."""
    for module in _managing(model):
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.13; one group in earlier releases
        yield from groups if groups is not None else filter(None, [state._fsdp_param_group])


def _managing(model: nn.Module) -> list[Any]:
    """The modules to which fully_shard was applied."""
    return [module for module in model.modules() if hasattr(module, "_get_fsdp_state")]
