"""The version. It is a module of its own for pyproject.toml, which reads it without torch, and for what lies below."""

__version__ = "0.1.0"
