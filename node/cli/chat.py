"""`swarmd run`: a conversation in the terminal, streaming."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from swarmd.node.cli.console import CommandError, DaemonClient, guarded, settings_of
from swarmd.partition.units import format_bytes


def chat(given: Mapping[str, Any], model: str, prompt: str | None) -> int:
    """Answer one prompt, or talk until the input ends; the exit code."""

    def work() -> int:
        client = DaemonClient(settings_of(given))
        served = _have_served(client, model)
        messages: list[dict[str, str]] = []
        if prompt is not None:
            _ask(client, served, messages, prompt)
            return 0
        if sys.stdin.isatty():
            print(f"{served} is ready. An empty line or Ctrl-D ends the conversation.")
        while text := _read_line():
            _ask(client, served, messages, text)
        return 0

    return guarded(work)


def _read_line() -> str:
    try:
        return input(">>> " if sys.stdin.isatty() else "")
    except EOFError:
        return ""


def _have_served(client: DaemonClient, model: str) -> str:
    """Have the swarm serve a model, showing what is going on until it is ready; its name in the swarm."""
    before = {instance["model"] for instance in client.get("/api/swarm")["instances"]}
    client.post("/api/instances", {"model": model})
    with Console(stderr=True).status(f"waiting for {model}") as shown:
        for event, data in client.events("GET", "/api/events"):
            if event == "progress":
                done, total = format_bytes(data["done_bytes"]), format_bytes(data["total_bytes"])
                shown.update(f"{data['model']}: {data['phase']} {done} of {total}")
                continue
            instance = _wanted(data["instances"], model, before)
            if instance is None:
                continue
            if instance["state"] == "ready":
                return instance["model"]
            if instance["state"] == "failed" or "missing" in instance["reason"]:
                raise CommandError(f"{instance['model']}: {instance['reason']}")
            shown.update(f"{instance['model']}: {instance['state']} {instance['reason']}")
    raise CommandError("the daemon went away while the model was being prepared")


def _wanted(instances: list[dict[str, Any]], model: str, before: set[str]) -> dict[str, Any] | None:
    """The instance that a name, an alias or a path means: of that name, else the one that has just come."""
    from swarmd.node.models.catalog import ModelNameError, resolve

    try:
        names = {model, resolve(model).name}
    except ModelNameError:
        names = {model}
    named = [instance for instance in instances if instance["model"] in names]
    fresh = [instance for instance in instances if instance["model"] not in before]
    return next(iter([*named, *fresh]), None)


def _ask(client: DaemonClient, model: str, messages: list[dict[str, str]], text: str) -> None:
    messages.append({"role": "user", "content": text})
    body = {"model": model, "messages": messages, "stream": True}
    answer = ""
    try:
        for _, chunk in client.events("POST", "/v1/chat/completions", body):
            if "error" in chunk:
                raise CommandError(chunk["error"]["message"])
            for choice in chunk["choices"]:
                piece = choice["delta"].get("content") or ""
                answer += piece
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        # Ctrl-C ends the answer; at the prompt it ends the conversation.
        print(" [stopped]", end="")
    print()
    messages.append({"role": "assistant", "content": answer})
