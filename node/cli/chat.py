"""`swarmd run`: a conversation in the terminal, streaming."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status

from swarmd.node.cli.console import USAGE_ERROR, CommandError, DaemonClient, guarded, settings_of
from swarmd.node.models.catalog import is_path
from swarmd.partition.units import format_bytes


def chat(given: Mapping[str, Any], model: str, prompt: str | None, wishes: Mapping[str, Any]) -> int:
    """Answer one prompt, or talk until the input ends; the exit code. `wishes` are sampling fields of the request."""

    def work() -> int:
        if prompt is not None and not prompt.strip():
            raise CommandError("the prompt is empty", USAGE_ERROR)
        client = DaemonClient(settings_of(given))
        body = {**wishes, "model": _have_served(client, _absolute(model)), "stream": True}
        messages: list[dict[str, str]] = []
        if prompt is not None:
            _ask(client, body, messages, prompt)
            return 0
        person = sys.stdin.isatty()
        if person:
            print(f"{body['model']} is ready. An empty line or Ctrl-D ends the conversation.")
        while text := _read_line():
            try:
                _ask(client, body, messages, text)
            except CommandError as error:
                if not person:
                    raise
                print(f"[{error}]", file=sys.stderr)
        return 0

    return guarded(work)


def _absolute(model: str) -> str:
    """A path as the daemon can use it, whose working directory is another."""
    return str(Path(model).expanduser().absolute()) if is_path(model) else model


def _read_line() -> str:
    try:
        return input(">>> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _have_served(client: DaemonClient, model: str) -> str:
    """Have the swarm serve a model, showing what is going on until it is ready; its name in the swarm."""
    told = ""
    with Console(stderr=True).status(f"waiting for {model}") as shown:
        name = _launched(client, model, shown)
        for event, data in client.events("GET", "/api/events"):
            if event == "progress":
                shown.update(_progress_line(data))
                continue
            instance = next((i for i in data["instances"] if i["model"] == name), None)
            if instance is None:
                continue
            if instance["state"] == "ready":
                return name
            if instance["state"] == "failed" or "missing" in instance["reason"]:
                raise CommandError(f"{name} cannot be served: {instance['reason']}")
            if instance["reason"] and instance["reason"] != told:
                told = instance["reason"]
                shown.console.print(f"{name}: {told}", markup=False, highlight=False)
            shown.update(f"{name}: {instance['state']}")
    raise CommandError("the node went away while the model was being prepared")


def _launched(client: DaemonClient, model: str, shown: Status) -> str:
    """Have an instance of a model; its name. The answer may wait for a download, which is shown meanwhile."""
    answered = threading.Event()

    def show() -> None:
        with contextlib.suppress(CommandError):
            for event, data in client.events("GET", "/api/events"):
                if answered.is_set():
                    return
                if event == "progress":
                    shown.update(_progress_line(data))

    threading.Thread(target=show, daemon=True).start()
    try:
        return client.post("/api/instances", {"model": model}, timeout=None)["model"]
    finally:
        answered.set()


def _progress_line(progress: dict[str, Any]) -> str:
    done, total = format_bytes(progress["done_bytes"]), format_bytes(progress["total_bytes"])
    return f"{progress['model']}: {progress['phase']} {done} of {total}"


def _ask(client: DaemonClient, body: Mapping[str, Any], messages: list[dict[str, str]], text: str) -> None:
    """One turn: print the answer as it comes, and take both into the conversation unless the answer failed."""
    turn = {"role": "user", "content": text}
    answer = ""
    try:
        for _, chunk in client.events("POST", "/v1/chat/completions", {**body, "messages": [*messages, turn]}):
            if "error" in chunk:
                raise CommandError(chunk["error"]["message"])
            for choice in chunk["choices"]:
                piece = choice["delta"].get("content") or ""
                answer += piece
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        # Ctrl-C ends the answer; at the prompt it ends the conversation.
        print(" [stopped]", end="")
    finally:
        if answer:
            print()
    messages += [turn, {"role": "assistant", "content": answer}]
