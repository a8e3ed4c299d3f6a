"""Lets matmuls read the transposed copy that the vector support's kernels need of the same matrix."""

from __future__ import annotations

import itertools

import torch
from torch import fx

from slcompile.passes.graph import Decision, Inserter, PassReport, arguments, name_of, op_name, transposes

_ATEN = torch.ops.aten
_PRODUCTS = ("mm", "addmm")


def read_transposed(gm: fx.GraphModule) -> PassReport:
    """Replaces x by the transpose of its transposed copy, where only matmuls read it beside that copy.

    On GPUs the vector support's kernels read x with the tokens side by side, padded (``tokens_side_by_side``). Inductor
    then computes an activation function or the last step of a norm as it writes that copy, and x itself is neither
    written nor read: the vendor's matmuls take an operand of either layout. Legal because the copy holds x, and a
    product does not depend on how its operand lies.

    Left: x that a matmul, a kernel or the caller made, which is there anyway; x that something else reads, too. No
    candidates: copies of symbolic sizes, which the graph reads, too; those of the model's own that do not hold x.

    Args:
        gm: A forward or a backward graph, lowered; changed in place.
    """
    report = PassReport()
    insert = Inserter(gm.graph)
    for clone in gm.graph.find_nodes(op="call_function", target=_ATEN.clone.default):
        chain = _copy_of(clone)
        if chain is None:
            continue
        x, *_ = chain[0].all_input_nodes
        readers = [user for user in x.users if user is not chain[0]]
        shape = tuple(x.meta["val"].shape)
        if not readers:
            continue
        if why := _why_not(x, readers):
            report.left.append(Decision(name_of(x), *why, shape, node=x.name))
            continue
        for before, node in itertools.pairwise([x, *chain]):  # x may be read before the kernel that needs the copy
            before.append(node)
        after = chain[-1].next
        back = insert.call(after, _ATEN.slice.Tensor, insert.transpose(after, chain[-1]), 0, 0, shape[0])
        for reader in readers:
            reader.replace_input_with(x, back)
        report.replaced.append(Decision(name_of(x), "", ", ".join(each.name for each in readers), shape, node=x.name))
    if report.replaced:
        gm.recompile()
    return report


def _copy_of(clone: fx.Node) -> list[fx.Node] | None:
    """Returns the nodes of a padded transposed copy, in order, if ``clone`` is what makes one."""
    (permute,), after = clone.all_input_nodes, list(clone.users)
    if not transposes(permute) or [op_name(each) for each in after] != ["as_strided"]:
        return None
    made, read = _layout(clone), _layout(after[0])
    if read != made or not all(isinstance(each, int) for each in made):
        return None
    (pad,) = permute.all_input_nodes
    if op_name(pad) != "constant_pad_nd" or [*pad.users] != [permute]:
        return None
    *others, tokens = arguments(pad)[1]
    if others != [0, 0, 0] or not isinstance(tokens, int) or tokens < 0:
        return None
    return [pad, permute, clone, *after]


def _layout(node: fx.Node) -> tuple[int | str, ...]:
    """Returns sizes, strides and offset; what is symbolic as text, since comparing it would guard the graph."""
    value = node.meta["val"]
    found = (*value.shape, *value.stride(), value.storage_offset())
    return tuple(each if isinstance(each, int) else str(each) for each in found)


def _why_not(x: fx.Node, readers: list[fx.Node]) -> tuple[str, str] | None:
    """Says why x itself is needed, if it is."""
    if not (isinstance(x.target, torch._ops.OpOverload) and torch.Tag.pointwise in x.target.tags):
        return "there", f"{op_name(x)} made it: it lies in memory anyway"
    for reader in readers:
        if op_name(reader) not in _PRODUCTS or x not in arguments(reader)[-2:]:
            return "read", f"{op_name(reader)} reads it, too"
    return None
