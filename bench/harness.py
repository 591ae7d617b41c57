"""What the lab borrows from the tests: real daemons, network namespaces, `transformers` models of GGUF files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.netns import Lan, connect, inside, ip, why_unavailable
from support.swarm import Node, join

__all__ = ["Lan", "Node", "connect", "file_oracle", "inside", "ip", "join", "why_unavailable"]


def file_oracle(path: Path) -> Any:
    """The `transformers` model, in fp32, of a llama GGUF file with tied embeddings. Imports torch."""
    from support.llama_oracle import file_oracle

    return file_oracle(path)
