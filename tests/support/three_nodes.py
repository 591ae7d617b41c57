"""Three nodes of one swarm, with memory in the ratio 4:2:1 and one model split among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from support.swarm import Node, join

MEMORY = {"large": "640MB", "medium": "320MB", "small": "160MB"}
STORY = "Tell me a long story about a lighthouse keeper and a whale."


def options(name: str) -> tuple[str, ...]:
    """A node's options.

    They are told to split the model, which the large one could hold alone. A context this long makes layers large in
    comparison with what each stage needs anyway. One thread each, because the nodes share this machine. Activations
    travel as f32, so that answers are equal to the last bit.
    """
    limits = ("--memory", MEMORY[name], "--context", "8192", "--threads", "1")
    return (*limits, "--wire-dtype", "f32", "--model", "none", "--split")


def split_model(nodes: Sequence[Node], model: Path) -> None:
    """Have nodes that know each other serve a model file of the first one, one stage each; the others fetch theirs."""
    for node in nodes:
        node.until_members(len(nodes))
    nodes[0].serve(model)
    for node in nodes:
        node.until_ready(stages=len(nodes))


@contextmanager
def three_nodes(root: Path, model: Path, namespaces: Sequence[str | None] = (None, None, None)) -> Iterator[list[Node]]:
    """Three nodes that nobody has told of each other, serving `model` in three stages."""
    with ExitStack() as stack:
        large, medium, small = MEMORY
        first = stack.enter_context(Node(root / large, *options(large), namespace=namespaces[0]))
        token = first.token()
        nodes = [first]
        for name, namespace in zip((medium, small), namespaces[1:], strict=True):
            nodes.append(stack.enter_context(join(token, root / name, *options(name), namespace=namespace)))
        split_model(nodes, model)
        yield nodes
