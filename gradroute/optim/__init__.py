"""RoutedAdamW, an AdamW that leaves alone what no gradient touches, and a routed model's parameter groups for it."""

from .adamw import RoutedAdamW
from .param_groups import routed_param_groups

__all__ = ["RoutedAdamW", "routed_param_groups"]
