"""What the lab borrows from the tests: real daemons, network namespaces, `transformers` models of GGUF files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.answers import Answer
from support.fault_cases import (
    CASES_PER_SWARM,
    CONTEXT,
    DECODE,
    EIGHT,
    FAULTS,
    HEIRS,
    PREFILL,
    STAGES,
    Fault,
    Phase,
    machines,
    restore,
    run_case,
    talk,
)
from support.fault_lab import FaultLab
from support.growth import Growing, grow
from support.host_faults import why_no_small_disk
from support.long_line import IFF_TUN, VNET_HEADER, from_device, open_device
from support.netns import Lan, connect, inside, ip, why_unavailable
from support.network_faults import why_no_network_faults
from support.soak import soak
from support.solo import alone, expecting
from support.stream_load import Load, Outcome, Question, compare
from support.swarm import Node, join
from support.unrelated import disturbances

__all__ = [
    "CASES_PER_SWARM",
    "CONTEXT",
    "DECODE",
    "EIGHT",
    "FAULTS",
    "HEIRS",
    "IFF_TUN",
    "PREFILL",
    "STAGES",
    "VNET_HEADER",
    "Answer",
    "Fault",
    "FaultLab",
    "Growing",
    "Lan",
    "Load",
    "Node",
    "Outcome",
    "Phase",
    "Question",
    "alone",
    "compare",
    "connect",
    "disturbances",
    "expecting",
    "file_oracle",
    "from_device",
    "grow",
    "inside",
    "ip",
    "join",
    "machines",
    "open_device",
    "restore",
    "run_case",
    "soak",
    "talk",
    "why_no_network_faults",
    "why_no_small_disk",
    "why_unavailable",
]


def file_oracle(path: Path) -> Any:
    """The `transformers` model, in fp32, of a llama GGUF file with tied embeddings. Imports torch."""
    from support.llama_oracle import file_oracle

    return file_oracle(path)
