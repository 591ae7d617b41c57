"""Entry point of a stage process: `python -m swarmd.node.serving.stage_main`. Started by the daemon only."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from swarmd.node.serving.drafting import NgramDrafter, PreparedDrafts
from swarmd.node.serving.messages import DATA_MESSAGES, LoadEngine, TrustChanged
from swarmd.node.serving.model_drafter import ModelDrafter
from swarmd.node.serving.prompt_wakeup import wake_promptly
from swarmd.node.serving.speculation import Speculation
from swarmd.node.serving.stage_process import ReportBytes, StageProcess
from swarmd.node.version import VERSION
from swarmd.transport.denial_files import read_denials
from swarmd.transport.endpoint import Endpoint
from swarmd.transport.identity import load_credentials
from swarmd.transport.link import PROTOCOL_VERSION, Hello, Vocabulary
from swarmd.transport.statements import Denials

if TYPE_CHECKING:
    from swarmd.node.engine.spec import ArchSpec
    from swarmd.node.engine.stage_engine import StageEngine


def load_stage(job: LoadEngine, report: ReportBytes) -> StageEngine:
    """Build the engine of a job; imports torch, so it takes seconds. Raises ModelFileError, MemoryError, OSError."""
    from swarmd.node.engine.stage_engine import StageEngine

    show_as("swarmd stage")
    return StageEngine.load(
        job.model_path,
        None,
        job.start,
        job.end,
        threads=job.threads,
        kv_tokens=job.kv_tokens,
        context=job.context,
        sparse=job.sparse,
        kernels=job.kernels,
        device=job.device,
        progress=report,
        defer=True,
    )


def load_speculation(job: LoadEngine) -> Speculation | None:
    """What guesses tokens for the driver of a job: the text so far, and the draft model if there is one.

    Raises ModelFileError for a draft model that cannot be loaded or has another vocabulary, MemoryError, OSError.
    """
    if not job.speculate:
        return None
    quick = NgramDrafter()
    if not job.draft_path:
        return Speculation(quick)
    from swarmd.node.engine.stage_engine import StageEngine
    from swarmd.node.models.draft import DRAFT_KV_TOKENS, require_same_vocabulary

    path = Path(job.draft_path)
    spec = _spec(path, sparse=False)
    require_same_vocabulary(path, spec, _spec(Path(job.model_path), sparse=job.sparse))
    kv_tokens = min(DRAFT_KV_TOKENS, spec.context_length)
    engine = StageEngine.load(
        path, spec, 0, spec.n_layers, threads=job.threads, kv_tokens=kv_tokens, kernels=job.kernels
    )
    return Speculation(PreparedDrafts(quick, ModelDrafter(engine, spec.context_length)))


def _spec(path: Path, *, sparse: bool) -> ArchSpec:
    from swarmd.node.models.checkpoint import open_checkpoint

    with open_checkpoint(path, sparse=sparse) as checkpoint:
        return checkpoint.spec


def get_ready(device: str) -> None:
    """Import what a stage on this device will need, and takes long to import."""
    from swarmd.node.engine import stage_engine  # noqa: F401
    from swarmd.node.engine.computes import import_compute
    from swarmd.node.models import gguf_checkpoint, hf_checkpoint  # noqa: F401

    import_compute(device)


def show_as(name: str) -> None:
    """What `ps -o comm` and `top` call this process, on Linux; up to 15 characters."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)


async def run(data_dir: Path, daemon_port: int, ticket: str, name: str) -> None:
    """Serve until the daemon is gone."""
    credentials = load_credentials(data_dir)
    if credentials is None:
        raise SystemExit(f"{data_dir} holds no identity; stage processes are started by `swarmd`, not by hand")
    process = StageProcess(load_stage, load_speculation)
    wake_promptly()  # this thread; the one that computes is there already
    # The daemon ends a stage this way; its profile is still to be written.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, process.ended.set)

    def hello() -> Hello:
        return Hello(PROTOCOL_VERSION, "stage", name, VERSION, note=ticket)

    endpoint = Endpoint(credentials, Vocabulary(DATA_MESSAGES), process, hello=hello)
    denials = Denials(credentials.authority_keys())

    def read_trust(message: TrustChanged) -> None:
        present = load_credentials(data_dir)
        if present is not None and present.node_id == endpoint.node_id:
            endpoint.adopt(present)
            denials.trust(present.authority_keys())
        read_denials(data_dir, denials)
        endpoint.refuse(denials.refused)
        if message.members is not None:
            endpoint.keep_only(message.members)

    read_trust(TrustChanged())
    process.on_trust_changed = read_trust
    await process.serve(endpoint, daemon_port)


def main() -> None:
    """Parse what the daemon passed and run. The ticket names this start; it is no secret."""
    parser = argparse.ArgumentParser(prog="swarmd stage process")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--daemon-port", type=int, required=True)
    parser.add_argument("--ticket", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--log-level", default="INFO")
    parser.add_argument("--spare-for", default="", help="the device of the stage that may be needed")
    args = parser.parse_args()
    logging.basicConfig(
        level=args.log_level, format="%(asctime)s %(levelname).1s stage: %(message)s", datefmt="%H:%M:%S"
    )
    # Ctrl-C goes to the whole terminal group: the daemon drains and then ends its stages.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if args.spare_for:
        show_as("swarmd spare")
        get_ready(args.spare_for)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_run_and_exit(args))


async def _run_and_exit(args: argparse.Namespace) -> None:
    try:
        await run(args.data_dir, args.daemon_port, args.ticket, args.name)
    finally:
        # A step may still be computing on the other thread; nobody waits for it any more.
        logging.shutdown()
        os._exit(0)


if __name__ == "__main__":
    main()
