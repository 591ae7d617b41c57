"""A radix tree of token sequences: who shares the longest prefix with a new one. Pure.

The structure is RadixAttention's (Zheng et al. 2023, arXiv:2312.07104): edges carry runs of tokens, and sequences with
a common prefix share its nodes. Here every node knows all sequences that pass through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Match(NamedTuple):
    """`holder` can give the first `length` tokens now; `common` many are shared with somebody who will hold them."""

    holder: int
    length: int
    common: int


@dataclass(eq=False, slots=True)
class _Node:
    edge: tuple[int, ...]
    parent: _Node | None
    children: dict[int, _Node] = field(default_factory=dict)
    # A dict for its order: what is found does not depend on how ids hash.
    holders: dict[int, None] = field(default_factory=dict)


class PrefixTree:
    """Token sequences by the ids of their holders. Its size is that of the distinct prefixes held."""

    def __init__(self) -> None:
        self._root = _Node((), None)
        self._ends: dict[int, _Node] = {}

    def __len__(self) -> int:
        """Sequences held."""
        return len(self._ends)

    @property
    def tokens_stored(self) -> int:
        """Tokens on all edges; a shared prefix counts once."""
        return sum(len(node.edge) for node in self._all_nodes())

    @property
    def nodes(self) -> int:
        """Edges, that is."""
        return sum(1 for _ in self._all_nodes()) - 1

    def insert(self, holder: int, tokens: Sequence[int]) -> None:
        """Let `holder` hold `tokens` (one or more), instead of what it held before."""
        self.remove(holder)
        node, depth = self._root, 0
        while depth < len(tokens):
            child = node.children.get(tokens[depth])
            if child is None:
                child = _Node(tuple(tokens[depth:]), node)
                node.children[child.edge[0]] = child
            else:
                common = _common(child.edge, tokens, depth)
                if common < len(child.edge):
                    child = _split(child, common)
            child.holders[holder] = None
            node, depth = child, depth + len(child.edge)
        self._ends[holder] = node

    def remove(self, holder: int) -> None:
        """Forget what `holder` holds, if anything."""
        node = self._ends.pop(holder, None)
        while node is not None and node.parent is not None:
            parent = node.parent
            del node.holders[holder]
            if not node.holders:
                del parent.children[node.edge[0]]
            else:
                self._join(node)
            node = parent

    def match(self, tokens: Sequence[int], available: Callable[[int], int]) -> Match | None:
        """The holder of the longest prefix of `tokens`, of which `available(holder)` tokens can be had already.

        None when nobody's first token is that of `tokens`.
        """
        path: list[tuple[int, _Node]] = []
        node, depth = self._root, 0
        while depth < len(tokens) and (child := node.children.get(tokens[depth])) is not None:
            common = _common(child.edge, tokens, depth)
            depth += common
            path.append((depth, child))
            if common < len(child.edge):
                break
            node = child
        best: tuple[int, int] | None = None
        for shared, node in reversed(path):
            if best is not None and best[1] >= shared:
                break
            for holder in node.holders:
                length = min(shared, available(holder))
                if best is None or length > best[1]:
                    best = holder, length
        return None if best is None else Match(*best, depth)

    def _all_nodes(self) -> Iterator[_Node]:
        left = [self._root]
        while left:
            yield (node := left.pop())
            left += node.children.values()

    def _join(self, node: _Node) -> None:
        """Make one node of this and its only child where nobody ends between them, so that no splits pile up."""
        if len(node.children) != 1:
            return
        (child,) = node.children.values()
        if len(child.holders) < len(node.holders):
            return
        node.edge += child.edge
        node.children = child.children
        for grandchild in node.children.values():
            grandchild.parent = node
        for holder in node.holders:
            if self._ends[holder] is child:
                self._ends[holder] = node


def _split(node: _Node, at: int) -> _Node:
    """Cut a node's edge in two; the upper part, which is returned, takes its place."""
    assert node.parent is not None
    upper = _Node(node.edge[:at], node.parent, {node.edge[at]: node}, dict(node.holders))
    node.parent.children[upper.edge[0]] = upper
    node.edge, node.parent = node.edge[at:], upper
    return upper


def _common(edge: tuple[int, ...], tokens: Sequence[int], start: int) -> int:
    """How many tokens of `edge` follow in `tokens` from `start` on."""
    if edge == tuple(tokens[start : start + len(edge)]):
        return len(edge)
    count = 0
    for one, other in zip(edge, tokens[start : start + len(edge)], strict=False):
        if one != other:
            break
        count += 1
    return count
