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

from swarmd.node.serving.messages import DATA_MESSAGES, LoadEngine
from swarmd.node.serving.stage_process import ReportBytes, StageProcess
from swarmd.node.version import VERSION
from swarmd.transport.endpoint import Endpoint
from swarmd.transport.identity import load_credentials
from swarmd.transport.link import PROTOCOL_VERSION, Hello, Vocabulary

if TYPE_CHECKING:
    from swarmd.node.engine.stage_engine import StageEngine


def load_stage(job: LoadEngine, report: ReportBytes) -> StageEngine:
    """Build the engine of a job; imports torch, so it takes seconds. Raises ModelFileError, MemoryError, OSError."""
    from swarmd.node.engine.spec import ArchSpec
    from swarmd.node.engine.stage_engine import StageEngine
    from swarmd.node.models.gguf import GGUFFile

    path = Path(job.model_path)
    with GGUFFile.open(path, sparse=job.sparse) as file:
        spec = ArchSpec.from_gguf(file.metadata, file.tensors)
    return StageEngine.load(
        path,
        spec,
        job.start,
        job.end,
        threads=job.threads,
        kv_tokens=job.kv_tokens,
        sparse=job.sparse,
        progress=report,
    )


async def run(data_dir: Path, daemon_port: int, ticket: str, name: str) -> None:
    """Serve until the daemon is gone."""
    credentials = load_credentials(data_dir)
    if credentials is None:
        raise SystemExit(f"{data_dir} holds no identity; stage processes are started by `swarmd`, not by hand")
    process = StageProcess(load_stage)

    def hello() -> Hello:
        return Hello(PROTOCOL_VERSION, "stage", name, VERSION, note=ticket)

    endpoint = Endpoint(credentials, Vocabulary(DATA_MESSAGES), process, hello=hello)
    await process.serve(endpoint, daemon_port)


def main() -> None:
    """Parse what the daemon passed and run. The ticket names this start; it is no secret."""
    parser = argparse.ArgumentParser(prog="swarmd stage process")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--daemon-port", type=int, required=True)
    parser.add_argument("--ticket", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--log-level", default="INFO")
    args = parser.parse_args()
    logging.basicConfig(
        level=args.log_level, format="%(asctime)s %(levelname).1s stage: %(message)s", datefmt="%H:%M:%S"
    )
    # Ctrl-C goes to the whole terminal group: the daemon drains and then ends its stages.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
