"""The report of a run: one HTML file that needs no network and no scripts, and the same figures as JSON.

`write(folder, results)` makes both of whatever results there are.
"""

from .page import render, write

__all__ = ["write", "render"]
