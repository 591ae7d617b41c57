"""The baseline: llama.cpp's llama-server, alone and as the head of RPC workers; the user builds it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from load import Server
from processes import Contender, Needs, Place, Processes, Unavailable, free_port
from relay import Network

BUILD_HINT = (
    "build llama-server and ggml-rpc-server as bench/METHOD.md says and name the folder that holds them with "
    "--llama-cpp FOLDER or SWARMD_LLAMA_CPP"
)


@dataclass(frozen=True)
class LlamaCpp:
    """A folder with llama.cpp's programs; None: SWARMD_LLAMA_CPP names it."""

    folder: Path | None

    def version(self) -> str:
        """Like `llama.cpp 0.5.0-dev (build 1, commit 0c1e570)`. Raises Unavailable when it is not there."""
        done = subprocess.run([self._program("llama-server"), "--version"], capture_output=True, text=True, check=False)
        found = re.search(r"version: (.+)", done.stdout + done.stderr)
        return f"llama.cpp {found[1] if found else 'of an unknown version'}"

    @contextmanager
    def single(self, needs: Needs, place: Place, flags: Sequence[str] = ()) -> Iterator[Contender]:
        """One llama-server, with a slot for every stream."""
        with Processes() as processes:
            server = self._head(processes, needs, place, flags)
            yield Contender(needs.name, server, f"{self.version()}; {place}; {_show(flags)}", processes.pids, place)

    @contextmanager
    def rpc(
        self,
        needs: Needs,
        head: Place,
        workers: Sequence[Place],
        flags: Sequence[str] = (),
        network: Network | None = None,
    ) -> Iterator[Contender]:
        """llama-server as the head of RPC workers. Unless `flags` say otherwise (-ngl), these have all layers.

        On a network the workers are on its machines, one each, and the head is with the first.
        """
        with Processes() as processes:
            addresses = [self._worker(processes, place, index, network) for index, place in enumerate(workers)]
            flags = [*(() if "-ngl" in flags else ("-ngl", "99")), *flags]
            namespace = network.namespaces[0] if network else None
            server = self._head(processes, needs, head, ["--rpc", ",".join(addresses), *flags], namespace)
            detail = f"{self.version()}; workers: {' + '.join(map(str, workers))}; head: {head}; {_show(flags)}"
            yield Contender(needs.name, server, detail, processes.pids, head)

    def _worker(self, processes: Processes, place: Place, index: int, network: Network | None) -> str:
        """An RPC worker; `host:port` for the head."""
        host, namespace = (network.address(index), network.namespaces[index]) if network else ("127.0.0.1", None)
        port = free_port(namespace)
        program = self._program("ggml-rpc-server", "rpc-server")
        command = [program, "-t", str(place.threads), "-H", host, "-p", str(port)]
        processes.start("ggml-rpc-server", command, place.cores, namespace)
        processes.wait_for_port(host, port, namespace)
        return f"{host}:{port}"

    def _head(
        self, processes: Processes, needs: Needs, place: Place, flags: Sequence[str], namespace: str | None = None
    ) -> Server:
        """A llama-server that answers."""
        port = free_port(namespace)
        command = [self._program("llama-server"), "-m", str(needs.model.path), "--port", str(port)]
        command += ["-t", str(place.threads), "-np", str(needs.streams), "-c", str(needs.streams * needs.length)]
        # Its store of past prompts is of no use for prompts that never come again, and copying into it costs time.
        command += ["--cache-ram", "0", "--no-webui", *flags]
        processes.start("llama-server", command, place.cores, namespace)
        server = Server(f"http://127.0.0.1:{port}", "llama", needs.model.name, needs.model.ends, namespace)
        processes.wait_for(server)
        return server

    def _program(self, *names: str) -> str:
        named = os.environ.get("SWARMD_LLAMA_CPP")
        folder = self.folder or (Path(named) if named else None)
        if folder is None:
            raise Unavailable(f"no llama.cpp was named: {BUILD_HINT}")
        for name in names:
            if (folder / name).is_file():
                return str(folder / name)
        raise Unavailable(f"{folder} holds no {names[0]}: {BUILD_HINT}")


def _show(flags: Sequence[str]) -> str:
    return " ".join(flags) or "default flags"
