"""The command line: `swarmd` and its subcommands. Imports nothing heavy, so that --help is instant."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from swarmd.node.options import DEFAULT_MODEL, OPTIONS

HELP = """Run large language models on all the machines you own, together.

Bare `swarmd` starts this machine's node. On the first start it founds a swarm and prints what to type on the next machine.
Every option may also stand in the environment as SWARMD_NAME_OF_OPTION or in config.toml in the data dir."""

app = typer.Typer(name="swarmd", help=HELP, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

Name = Annotated[str | None, typer.Option(help=OPTIONS["name"])]
Dir = Annotated[str | None, typer.Option("--data-dir", help=OPTIONS["data_dir"])]
Listen = Annotated[str | None, typer.Option(help=OPTIONS["listen"])]
ApiKey = Annotated[str | None, typer.Option(help=OPTIONS["api_key"])]
Port = Annotated[int | None, typer.Option(help=OPTIONS["port"])]
Peer = Annotated[list[str] | None, typer.Option(help=OPTIONS["peer"])]
Mdns = Annotated[bool | None, typer.Option("--mdns/--no-mdns", help=OPTIONS["mdns"])]
Memory = Annotated[str | None, typer.Option(help=OPTIONS["memory"])]
Device = Annotated[str | None, typer.Option(help=OPTIONS["device"])]
Threads = Annotated[int | None, typer.Option(help=OPTIONS["threads"])]
Model = Annotated[str | None, typer.Option(help=OPTIONS["model"])]
Context = Annotated[int | None, typer.Option(help=OPTIONS["context"])]
Split = Annotated[bool | None, typer.Option("--split/--no-split", help=OPTIONS["split"])]
WireDtype = Annotated[str | None, typer.Option(help=OPTIONS["wire_dtype"])]
LogLevel = Annotated[str | None, typer.Option(help=OPTIONS["log_level"])]


@app.callback(invoke_without_command=True)
def main_command(
    context: typer.Context,
    name: Name = None,
    data_dir: Dir = None,
    listen: Listen = None,
    api_key: ApiKey = None,
    port: Port = None,
    peer: Peer = None,
    mdns: Mdns = None,
    memory: Memory = None,
    device: Device = None,
    threads: Threads = None,
    model: Model = None,
    context_length: Annotated[int | None, typer.Option("--context", help=OPTIONS["context"])] = None,
    split: Split = None,
    wire_dtype: WireDtype = None,
    log_level: LogLevel = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Without a subcommand: start the node."""
    if version:
        from swarmd.node.version import VERSION

        typer.echo(f"swarmd {VERSION}")
        raise typer.Exit
    given = {
        "name": name,
        "data_dir": data_dir,
        "listen": listen,
        "api_key": api_key,
        "port": port,
        "peer": tuple(peer) if peer else None,
        "mdns": mdns,
        "memory": memory,
        "device": device,
        "threads": threads,
        "model": model,
        "context": context_length,
        "split": split,
        "wire_dtype": wire_dtype,
        "log_level": log_level,
    }
    context.obj = given
    if context.invoked_subcommand is None:
        from swarmd.node.cli.serve import serve

        raise typer.Exit(serve(given))


@app.command()
def join(
    context: typer.Context,
    token: Annotated[str, typer.Argument(help="The join token, or - to read it from standard input.")] = "",
) -> None:
    """Join the swarm of TOKEN and start this machine's node. Options go before: `swarmd --memory 4GB join TOKEN`.

    The token may also stand in SWARMD_TOKEN. It is used once, to certify this node's key, and not kept.
    """
    from swarmd.node.cli.serve import join_swarm, serve

    text = sys.stdin.readline() if token == "-" else token or os.environ.pop("SWARMD_TOKEN", "")
    code = join_swarm(context.obj, text)
    if code == 0:
        _forget_arguments(token, context.obj)
        code = serve(context.obj)
    raise typer.Exit(code)


@app.command()
def token(context: typer.Context) -> None:
    """Print the command that joins the next machine, with this swarm's token."""
    from swarmd.node.cli.serve import show_token

    raise typer.Exit(show_token(context.obj))


@app.command()
def status(
    context: typer.Context, json: Annotated[bool, typer.Option("--json", help="Print the raw state.")] = False
) -> None:
    """Show the swarm: nodes, devices, memory, instances and their stages."""
    from swarmd.node.cli.status import status as run

    raise typer.Exit(run(context.obj, as_json=json))


@app.command()
def run(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Name of a model, or the path of a GGUF file.")] = DEFAULT_MODEL,
    prompt: Annotated[str | None, typer.Argument(help="One question; without it, a conversation.")] = None,
) -> None:
    """Chat with a model in the terminal; the swarm starts it if nobody serves it yet."""
    from swarmd.node.cli.chat import chat

    raise typer.Exit(chat(context.obj, model, prompt))


@app.command()
def pull(context: typer.Context, model: Annotated[str, typer.Argument(help="Name of a model.")]) -> None:
    """Bring a model to this machine."""
    from swarmd.node.cli.models import pull as run

    raise typer.Exit(run(context.obj, model))


@app.command()
def models(context: typer.Context) -> None:
    """List the models that can be had by name and those on this machine."""
    from swarmd.node.cli.models import list_models

    raise typer.Exit(list_models(context.obj))


@app.command()
def stop(context: typer.Context) -> None:
    """Stop this machine's node."""
    from swarmd.node.cli.status import stop as run

    raise typer.Exit(run(context.obj))


def _forget_arguments(token: str, given: dict[str, object]) -> None:
    """A token on the command line stays visible in the process list for as long as the process does: start over
    without it, the settings passed in the environment."""
    if token in ("", "-"):
        return
    from swarmd.node.options import environment_name

    environment = dict(os.environ)
    for option, value in given.items():
        if value is not None:
            environment[environment_name(option)] = ",".join(value) if isinstance(value, tuple) else str(value)
    environment.pop("SWARMD_TOKEN", None)
    os.execve(sys.executable, [sys.executable, "-m", "swarmd.node.cli.app"], environment)


def main() -> None:
    """Entry point of the `swarmd` script."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
