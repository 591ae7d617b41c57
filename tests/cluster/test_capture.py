"""Who listens on the network between the machines learns nothing of what is asked, answered or computed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.capture import Capture, Flow, chi_square, leaks, needles, repeated_blocks
from support.netns import Lan, why_unavailable
from support.three_nodes import three_nodes

from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.models.tokenizer import Tokenizer
from swarmd.node.serving.messages import DATA_MESSAGES, Generate
from swarmd.transport.frames import Envelope, encode_head
from swarmd.transport.frames import Flow as FrameFlow
from swarmd.transport.link import Vocabulary

PROMPT = "My secret word is Zanzibarquartz-4711. Tell me about the marigold harvest in old Heliopolis."
MAX_TOKENS = 24
HIDDEN_BYTES = 576 * 4


@pytest.fixture(scope="module")
def tokenizer(smollm2_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(smollm2_metadata)


def test_the_search_would_find_what_an_unencrypted_link_carries(tokenizer: Tokenizer) -> None:
    """What the test below does not find must be something that it could find."""
    ids = tokenizer.encode(PROMPT, add_special=False)
    order = Generate("an instance", 1, tuple(ids), SamplingParams(), 10, ())
    frame = encode_head(Envelope(FrameFlow.STREAM, 1, Vocabulary(DATA_MESSAGES).encode(order)), 0)
    assert leaks(frame, needles([], [ids]))
    assert leaks(f"GET /{PROMPT}".encode(), needles([PROMPT], []))
    hidden = np.random.default_rng(0).normal(size=(20, 576)).astype(np.float32).tobytes()
    assert chi_square(hidden) > 10_000
    assert repeated_blocks(hidden + frame + hidden) >= len(hidden) - 8


@pytest.mark.slow
@pytest.mark.netns
@pytest.mark.timeout(240)
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_the_traffic_between_machines_tells_a_listener_nothing(
    tmp_path: Path, smollm2_path: Path, tokenizer: Tokenizer
) -> None:
    with Lan(3) as lan, three_nodes(tmp_path, smollm2_path, lan.names) as nodes:
        places = {node.id: lan.addresses(index) for index, node in enumerate(nodes)}
        [instance] = nodes[0].get("/api/swarm")["instances"]
        route = [places[stage["node"]] for stage in instance["stages"]]
        # The request and the answer cross the network, too: the driver is on another machine than the client.
        entry = next(node for node in nodes if node.id != instance["stages"][0]["node"])
        with Capture(lan.bridge) as capture:
            # The same question twice: in the clear, the same activations would pass twice, at least the answer's.
            answers = [entry.chat(PROMPT, max_tokens=MAX_TOKENS) for _ in range(2)]
        control_ports = {node.link_port for node in nodes}
    text = answers[0]["choices"][0]["message"]["content"]
    assert text == answers[1]["choices"][0]["message"]["content"]

    flows = capture.flows()
    stage_flows = [flow for flow in flows if not {flow.source[1], flow.target[1]} & control_ports]
    # The second time the stages have the prompt in their caches.
    first, second = (answer["usage"] for answer in answers)
    tokens = first["total_tokens"] - 1 + second["completion_tokens"]
    for here, there in pairwise(route):
        assert tokens * HIDDEN_BYTES < carried(stage_flows, here, there) < 2 * tokens * HIDDEN_BYTES

    secret = b"".join(body for flow in flows for body in flow.application_data())
    ids = [tokenizer.encode(said, add_special=False) for said in (PROMPT, text)]
    wanted = needles([PROMPT, text], ids)
    assert leaks(b"".join(flow.data for flow in flows), wanted) == []
    assert leaks(b"\n".join(capture.packets), wanted) == []
    assert repeated_blocks(secret) == 0
    assert chi_square(secret) < 400


def carried(flows: list[Flow], source: set[str], target: set[str]) -> int:
    """Bytes of application data from one machine to another."""
    between: Iterator[Flow] = (flow for flow in flows if flow.source[0] in source and flow.target[0] in target)
    return sum(len(body) for flow in between for body in flow.application_data())
