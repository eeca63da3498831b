"""Public names that a package imports on first use."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module


def import_name(package: str, homes: Mapping[str, str], name: str) -> object:
    """Return a public name of a package, for its `__getattr__`.

    Args:
        package: `__name__` of the package.
        homes: the module of the package in which each public name is defined.
        name: the name that was asked for.

    Raises:
        AttributeError: the package has no such name; the message lists the names.
        ModuleNotFoundError: the module needs a package that is not installed.
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(homes)}.")
    return getattr(import_module(f"{package}.{homes[name]}"), name)
