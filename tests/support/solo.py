"""What a swarm under faults is compared with: one node alone, with nothing else to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.answers import Answer
from support.stream_load import Question
from support.swarm import Node

Reference = Callable[..., Answer]


@contextmanager
def alone(data_dir: Path, model: Path) -> Iterator[Reference]:
    """`ask(prompt, **options)`: the answer of a node alone; asked once per question."""
    answers: dict[str, Answer] = {}
    with Node(data_dir, "--model", str(model), "--no-mdns", "--context", "2048", "--threads", "1") as node:

        def ask(prompt: str, **options: Any) -> Answer:
            question = repr((prompt, sorted(options.items())))
            if question not in answers:
                node.until_ready(stages=1)
                answers[question] = node.answer(prompt, **options)
            return answers[question]

        yield ask


def expecting(reference: Reference) -> Callable[[Question], Answer]:
    """The same, asked by question."""
    return lambda question: reference(question.prompt, **dict(question.options))
