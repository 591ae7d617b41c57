"""The scheduler's steps on real stages: forks, drafts, retained sequences and a full cache change no token."""

import random
from collections import deque
from itertools import pairwise

import pytest
from support.kernels import why_missing
from support.tiny_gguf import VOCAB_SIZE, TinyModel, Type, write_tiny_gguf

from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.engine.stage_engine import SequenceChunk, StageEngine
from swarmd.node.models.gguf import GGUFFile
from swarmd.node.models.gguf_spec import spec_from_gguf
from swarmd.node.serving.messages import TokenChoice
from swarmd.node.serving.scheduler import Scheduler
from swarmd.node.serving.sequences import Sequence
from swarmd.node.serving.steps import Limits

MODEL = TinyModel(type=Type.Q4_1, types={"token_embd": Type.Q8_0}, context_length=96)
TOKENS_OUT = 14
GREEDY, SAMPLED = SamplingParams(temperature=0), SamplingParams(temperature=0.8, seed=5)


@pytest.fixture(params=["native", "torch"])
def kernels(request):
    if request.param == "native" and (why := why_missing()):
        pytest.skip(why)
    return request.param


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("scheduled") / "tiny.gguf", MODEL)


def load(path, kernels, *cuts, kv_tokens=512):
    with GGUFFile.open(path) as file:
        spec = spec_from_gguf(file.metadata, file.tensors)
    edges = pairwise([0, *cuts, MODEL.n_layers])
    return [
        StageEngine.load(path, spec, start, end, threads=1, kv_tokens=kv_tokens, kernels=kernels)
        for start, end in edges
    ]


def alone(engine, prompt, sampling):
    """What a request draws when nobody else is served and nothing is cached."""
    engine.open(0, sampling)
    tokens, start = list(prompt), 0
    while len(tokens) < len(prompt) + TOKENS_OUT:
        result = engine.step([SequenceChunk(0, start, tuple(tokens[start:]), sample=1)], None, "f32")
        start = len(tokens)
        tokens.append(result.samples[0].token)
    engine.free(0)
    return tokens[len(prompt) :]


class KnowsWhatComes:
    """Guesses right, or wrong, as chance has it."""

    def __init__(self, expected):
        self.expected = expected
        self.accepted = 0
        self._rng = random.Random(1)

    def propose(self, seq, tokens, limit):
        right = self.expected[seq][len(tokens) : len(tokens) + min(limit, 4)]
        return [token if self._rng.random() < 0.7 else (token + 1) % VOCAB_SIZE for token in right]

    def observe(self, seq, proposed, accepted):
        self.accepted += accepted

    def forget(self, seq):
        pass


def run_step(stages, step):
    """As a stage process does it, one stage after the other."""
    hidden, result = None, None
    for stage in stages:
        for opening in step.open:
            stage.open(opening.seq, opening.sampling, opening.source, opening.length)
        for seq in step.free:
            stage.free(seq)
        result = stage.step(step.chunks, hidden, "f32")
        hidden = result.payload
    assert result is not None
    return tuple(TokenChoice(s.seq, s.position, s.token, s.logprob) for s in result.samples)


def requests():
    """Prompts with the same beginning, the same prompt twice, and one that goes on from another."""
    rng = random.Random(3)
    shared = [rng.randrange(VOCAB_SIZE) for _ in range(45)]
    prompts = [[*shared[: 45 - 5 * (seed % 3)], *[rng.randrange(VOCAB_SIZE) for _ in range(5)]] for seed in range(8)]
    return [(prompt, GREEDY if index % 2 else SAMPLED) for index, prompt in enumerate([*prompts, prompts[0], shared])]


@pytest.mark.parametrize("kv_tokens", [512, 176], ids=["roomy", "tight"])
@pytest.mark.parametrize("cuts", [(), (2,), (1, 3)], ids=["one stage", "two", "three"])
def test_every_request_gets_what_it_would_have_got_alone(path, kernels, cuts, kv_tokens):
    (whole,) = load(path, kernels)
    asked = requests()
    expected = [alone(whole, prompt, sampling) for prompt, sampling in asked]
    stages = load(path, kernels, *cuts, kv_tokens=kv_tokens)
    drafter = KnowsWhatComes([[*prompt, *out] for (prompt, _), out in zip(asked, expected, strict=True)])
    limits = Limits(len(stages), kv_tokens, MODEL.context_length, growth=4, max_running=6)
    scheduler = Scheduler(limits, drafter)
    sequences = [
        Sequence(seq, list(prompt), sampling, TOKENS_OUT, frozenset()) for seq, (prompt, sampling) in enumerate(asked)
    ]
    # Half of them come at once, the others one by one, as others end.
    waiting = deque(sequences)
    in_flight = deque()
    for _ in range(5):
        scheduler.submit(waiting.popleft())
    while True:
        if (step := scheduler.next_step()) is not None:
            in_flight.append((step.step, run_step(stages, step)))
        elif in_flight:
            for progress in scheduler.on_sampled(*in_flight.popleft()):
                if progress.finish and waiting:
                    scheduler.submit(waiting.popleft())
        else:
            break
    for (prompt, _), sequence, out in zip(asked, sequences, expected, strict=True):
        assert sequence.tokens == [*prompt, *out]
    assert drafter.accepted > 20
    assert scheduler.prefix_tokens_reused > 150
