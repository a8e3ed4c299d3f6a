"""What a weight is called: its qualified name, and the name of the submodule that holds its factors."""

from __future__ import annotations

from slcompile import torch_private

SUFFIX = "_sl"
"""Name of the submodule beside the weight's; not the weight's own, which get_submodule would resolve to a tensor."""


def plain_name(name: str) -> str:
    """Returns a qualified name without the wrappers around modules, which are no part of a weight's name."""
    for wrapped in torch_private.WRAPPED:
        name = name.replace(f"{wrapped}.", "")
    return name


def shown(name: str) -> str:
    """Returns a name as a line of text shows it: what is not printable, such as a line break, as its escape."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in name)


def qualified(path: str, name: str) -> str:
    """Returns the name of a module's attribute below the root that the module's path starts from; "" is the root."""
    return f"{path}.{name}" if path else name
