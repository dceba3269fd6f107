"""The recipes by name."""

from __future__ import annotations

#: Recipe → what it does; its stages are `STAGES` of the module of its name.
RECIPES: dict[str, str] = {
    "unlearn": "takes out of a model what some texts teach, and keeps the rest",
    "localize": "confines what some texts teach to a dimension or a block of units",
    "adapters": "trains a LoRA for each route, of one batch",
}
