"""The command line: `swarmd` and its subcommands. Imports nothing heavy, so that --help is instant."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from swarmd.node.cli.parameters import Given, with_options
from swarmd.node.options import DEFAULT_MODEL, OPTIONS, environment_name

HELP = """Run large language models on all the machines you own, together.

Bare `swarmd` starts this machine's node. The first start founds a swarm and prints what to type on the next machine.
Every option may also stand in the environment as SWARMD_NAME_OF_OPTION, or in config.toml in the data dir."""

MODEL_HELP = "Name of a model, or the path of a GGUF file or a folder."
# Small models, which most machines run, wander at the API's usual 1 and, where two words are as likely, at 0.2 still.
CHAT_TEMPERATURE = 0.0
_API_KEY_FLAG = "--api-key"

app = typer.Typer(name="swarmd", help=HELP, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
@with_options(*OPTIONS)
def main_command(
    call: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Without a subcommand: start the node."""
    if version:
        from swarmd.node.version import VERSION

        typer.echo(f"swarmd {VERSION}")
        raise typer.Exit
    if call.invoked_subcommand is None:
        from swarmd.node.cli.serve import serve

        raise typer.Exit(serve(call.obj))


@app.command()
@with_options(*OPTIONS)
def join(
    call: typer.Context,
    token: Annotated[
        str, typer.Argument(metavar="TOKEN", help="The join token, or - to read it from standard input.")
    ] = "",
) -> None:
    """Join the swarm of TOKEN and start this machine's node.

    The token may also stand in SWARMD_TOKEN. It is used once, to certify this node's key, and not kept.
    """
    from swarmd.node.cli.identity import join_swarm

    text = sys.stdin.readline() if token == "-" else token or os.environ.get("SWARMD_TOKEN", "")
    code = join_swarm(call.obj, text)
    if code == 0:
        _start_over(call.obj)
    raise typer.Exit(code)


@app.command()
@with_options("data_dir")
def token(call: typer.Context) -> None:
    """Print the command that joins the next machine, with this swarm's token."""
    from swarmd.node.cli.identity import show_token

    raise typer.Exit(show_token(call.obj))


@app.command()
@with_options("data_dir")
def evict(
    call: typer.Context,
    node: Annotated[str, typer.Argument(metavar="NODE", help="The node's name, or the beginning of its id.")],
    undo: Annotated[bool, typer.Option("--undo", help="Let a node that was evicted take part again.")] = False,
) -> None:
    """Expel a node from the swarm. Run it on the machine that founded the swarm, which keeps the token.

    All members close their links with the node and refuse it from then on. Somebody who knows the join token can come
    back as another node: if that may be so, run `swarmd rotate` too.
    """
    from swarmd.node.cli.trust import evict as run

    raise typer.Exit(run(call.obj, node, undo=undo))


@app.command()
@with_options("data_dir")
def rotate(call: typer.Context) -> None:
    """Replace the join token. Run it on the machine that founded the swarm, while its node runs.

    Every member that can be reached gets a new certificate over its link, and what they serve goes on. Then the old
    token, and every certificate made with it, is worthless. Members that cannot be reached are listed: they have to
    join again with the new token, which `swarmd token` prints. Evict whom you do not trust before.
    """
    from swarmd.node.cli.trust import rotate as run

    raise typer.Exit(run(call.obj))


@app.command()
@with_options("data_dir", "api_key")
def status(
    call: typer.Context, json: Annotated[bool, typer.Option("--json", help="Print the raw state.")] = False
) -> None:
    """Show the swarm: nodes, devices, memory, models and stages."""
    from swarmd.node.cli.status import status as run

    raise typer.Exit(run(call.obj, as_json=json))


@app.command()
@with_options("data_dir", "api_key")
def run(
    call: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = DEFAULT_MODEL,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="One question; without it, a conversation.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(metavar="NUMBER", help="0 always takes the likeliest word; up to 2, ever less likely ones.")
    ] = CHAT_TEMPERATURE,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="COUNT", help="Longest answer. Default: as long as the context allows.")
    ] = None,
) -> None:
    """Chat with a model; the swarm starts it if need be."""
    from swarmd.node.cli.chat import chat

    wishes = {"temperature": temperature} | ({"max_tokens": max_tokens} if max_tokens is not None else {})
    raise typer.Exit(chat(call.obj, model, prompt, wishes))


@app.command()
@with_options("data_dir")
def pull(
    call: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
) -> None:
    """Bring a model to this machine, without serving it."""
    from swarmd.node.cli.models import pull as run

    raise typer.Exit(run(call.obj, model))


@app.command()
@with_options("data_dir")
def models(call: typer.Context) -> None:
    """List the models on this machine and those to be had."""
    from swarmd.node.cli.models import list_models

    raise typer.Exit(list_models(call.obj))


@app.command()
@with_options("data_dir", "listen", "port", "peer", "mdns", "memory", "device", "threads")
def doctor(
    call: typer.Context, json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False
) -> None:
    """Check this machine: kernels, memory, disk, clock, ports, network. Exit status 1 if something needs attention."""
    from swarmd.node.cli.doctor import doctor as run

    raise typer.Exit(run(call.obj, as_json=json))


@app.command()
@with_options("data_dir")
def stop(call: typer.Context) -> None:
    """Stop this machine's node."""
    from swarmd.node.cli.status import stop as run

    raise typer.Exit(run(call.obj))


def _start_over(given: Given) -> None:
    """Become bare `swarmd`, the settings passed in the environment.

    A process's command line and first environment stay readable for as long as it lives, and one holds the token.
    """
    environment = {key: value for key, value in os.environ.items() if key != "SWARMD_TOKEN"}
    for option, value in given.items():
        environment[environment_name(option)] = " ".join(value) if isinstance(value, list) else str(value)
    _become([], environment)


def _become(arguments: list[str], environment: dict[str, str]) -> None:
    # -P: a folder named swarmd in the working directory is not this program.
    os.execve(sys.executable, [sys.executable, "-P", "-m", "swarmd.node.cli.app", *arguments], environment)


def _hide_api_key(arguments: list[str]) -> tuple[list[str], str | None]:
    """The arguments without `--api-key KEY` or `--api-key=KEY`, and the last key among them. An empty one stays, to be
    complained of."""
    kept, key, rest = list[str](), None, list(arguments)
    while rest and rest[0] != "--":
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if name != _API_KEY_FLAG:
            kept.append(argument)
        elif value or (not equals and rest and rest[0]):
            key = value or rest.pop(0)
        else:
            kept.append(argument)
    return kept + rest, key


def main() -> None:
    """Entry point of the `swarmd` script."""
    arguments, key = _hide_api_key(sys.argv[1:])
    if key is not None:  # everybody on this machine can read a command line, for as long as the process lives
        _become(arguments, os.environ | {environment_name("api_key"): key})
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
