"""What travels on the data plane: entry node to driver, and around the ring of stages.

The stages of an instance form a ring: stage i dials stage i+1, the last one dials the first. Hidden states go forward
as the payload of `Step`; from the last stage to the first, where the driver is, the ring carries `Sampled`.
Every frame of the ring names its epoch, so that a stage can drop what belongs to an earlier plan.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from swarmd.discovery.records import Address, LoadRecord
from swarmd.node.engine.sampling_params import SamplingParams

Tokens = Annotated[tuple[int, ...], Meta(max_length=1 << 20)]
WireDtype = Literal["f32", "bf16", "f16", "q8"]
"""How hidden states travel over a link between two stages; node/engine/wire.py has the bytes."""
Microseconds = Annotated[int, Meta(ge=0, le=2**62)]
Kernels = Literal["auto", "native", "torch"]
"""What computes a stage: our own kernels, plain torch, or our kernels where they are there."""


class LoadEngine(Struct, frozen=True, tag="engine.load"):
    """Daemon to its own stage process: load layers [start, end) of the model file and listen for links.

    It is stage `index` of the pipeline and computes on `device`, by order of the node `owner`. The first stage guesses
    tokens ahead if it is to `speculate`, also with the draft model at `draft_path` if given.

    A process that holds just these layers for another epoch keeps them: it forgets all sequences, leaves its ring and
    belongs to this one.
    """

    instance: str
    epoch: int
    model_path: str
    sparse: bool
    start: int
    end: int
    kv_tokens: int
    context: int
    threads: int
    kernels: Kernels = "auto"
    speculate: bool = False
    draft_path: str = ""
    index: int = 0
    device: str = "cpu"
    owner: str = ""

    def same_stage(self, other: LoadEngine) -> bool:
        """Whether both jobs ask for the same of a process, but for the plan that they belong to."""
        return replace(self, epoch=0, index=0, owner="") == replace(other, epoch=0, index=0, owner="")


class EngineLoaded(Struct, frozen=True, tag="engine.loaded"):
    """The stage holds its layers and accepts links on `port`."""

    port: int
    weight_bytes: int


class EngineProgress(Struct, frozen=True, tag="engine.progress"):
    """Bytes of weights read so far, stage process to daemon."""

    done_bytes: int
    total_bytes: int


class Connect(Struct, frozen=True, tag="engine.connect"):
    """Daemon to its own stage process: the next stage of the ring, and how many there are; `next_node` must answer.

    Hidden states go to it in `wire_dtype`. From the stage before, which is on `previous_node` ("": not said), it comes.
    """

    n_stages: int
    next_node: str
    next_addresses: tuple[Address, ...]
    wire_dtype: WireDtype = "f32"
    previous_node: str = ""


class Connected(Struct, frozen=True, tag="engine.connected"):
    """The link to the next stage is up."""


class TrustChanged(Struct, frozen=True, tag="trust.changed"):
    """Daemon to its own stage process: read from the data dir again who this node is and whom it refuses.

    With `members`, links that came about under another authority end, but for theirs.
    """

    members: tuple[str, ...] | None = None


class EngineTrouble(Struct, frozen=True, tag="engine.trouble"):
    """Stage process to daemon: this stage cannot go on with its epoch, and why.

    If it is `sound`, the trouble is with a neighbour or a link, and the stage can serve in another epoch.
    """

    reason: str
    sound: bool = False


class EngineBeat(Struct, frozen=True, tag="engine.beat"):
    """Stage process to its daemon, twice a second: it lives.

    Before it is `settled` it loads, or its kernels may still be compiled, and it may be silent for longer. It holds
    `kv_tokens` of so many sequences, also those that ended and are retained.
    """

    settled: bool
    sequences: int = 0
    kv_tokens: int = 0


class RingBeat(Struct, frozen=True, tag="ring.beat"):
    """Either way on a ring link, twice a second: this stage lives. `settled` as in `EngineBeat`."""

    settled: bool


class EngineLoad(Struct, frozen=True, tag="engine.busy"):
    """Driver to its daemon: how busy it is; sent when it changes, a few times a second at most."""

    load: LoadRecord


class JoinRing(Struct, frozen=True, tag="ring.join"):
    """First request on a ring link: I am the stage before you in this epoch."""

    instance: str
    epoch: int


class Chunk(Struct, frozen=True, array_like=True):
    """`append(seq, start, tokens)`: consecutive tokens of one sequence, the first at position `start`.

    What a stage has cached from `start` on is forgotten first: so drafts that were rejected go away. After each of the
    last `sample` tokens (0: none) the last stage draws the token that follows, for as long as what it draws is the
    chunk's own next token.
    """

    seq: int
    start: int
    tokens: Tokens
    sample: Annotated[int, Meta(ge=0)]


class Opening(Struct, frozen=True, array_like=True):
    """A sequence begins; it is sampled by these wishes.

    With a `source` it begins as a copy of the first `length` tokens that this sequence has cached.
    """

    seq: int
    sampling: SamplingParams
    source: int = -1
    length: Annotated[int, Meta(ge=0)] = 0


class StepTimes(Struct, frozen=True, array_like=True):
    """Where a step's time went so far, in microseconds: computing in all stages, in the slowest of them, and waiting
    between arrival and computing in all.
    """

    compute_us: Microseconds = 0
    slowest_us: Microseconds = 0
    wait_us: Microseconds = 0


class Step(Struct, frozen=True, tag="ring.step"):
    """One micro-batch. Applied in this order: `open`, `free`, then the chunks.

    The payload is the hidden states, [total tokens of the chunks, hidden size], row-major, in `dtype`; empty for a
    step without chunks. Each stage sends in the type of its own link, and says so here.
    """

    epoch: int
    step: int
    open: tuple[Opening, ...]
    chunks: tuple[Chunk, ...]
    free: tuple[int, ...]
    dtype: WireDtype
    times: StepTimes = StepTimes()


class TokenChoice(Struct, frozen=True, array_like=True):
    """The token drawn for position `position` of a sequence, its log-probability, and the most likely ones if asked."""

    seq: int
    position: int
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampled(Struct, frozen=True, tag="ring.sampled"):
    """What the last stage drew in one step: per chunk to be sampled, one token or more at consecutive positions."""

    epoch: int
    step: int
    choices: tuple[TokenChoice, ...]
    times: StepTimes = StepTimes()


class StepFailed(Struct, frozen=True, tag="ring.failed"):
    """A stage could not run a step; handed on around the ring to the driver.

    `own`: by what the step asks for, so that any stage in its place would fail; else perhaps by the stage's own state.
    """

    epoch: int
    step: int
    reason: str
    own: bool = False


class Generate(Struct, frozen=True, tag="generate"):
    """Entry node to driver, as a stream: continue `tokens`, of which `sampling.prompt_tokens` are the prompt.

    The rest was generated before (a replay), so `max_tokens` counts only what is still to come.
    """

    instance: str
    epoch: int
    tokens: Tokens
    sampling: SamplingParams
    max_tokens: int
    stop_tokens: tuple[int, ...]


class Token(Struct, frozen=True, tag="token"):
    """One generated token, in order."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Finished(Struct, frozen=True, tag="finished"):
    """The generation ended by itself: at a stop token (not sent as a Token) or at the length asked for."""

    reason: Literal["stop", "length"]


DATA_MESSAGES = (
    LoadEngine,
    EngineLoaded,
    EngineProgress,
    Connect,
    Connected,
    TrustChanged,
    EngineTrouble,
    EngineBeat,
    EngineLoad,
    JoinRing,
    RingBeat,
    Step,
    Sampled,
    StepFailed,
    Generate,
    Token,
    Finished,
)
