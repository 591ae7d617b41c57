"""Options of a node as parameters of commands: `swarmd --memory 4GB join TOKEN` and `swarmd join TOKEN --memory 4GB`.

Imports nothing heavy, so that --help is instant.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from swarmd.node.options import OPTIONS, flag_name

Given = dict[str, Any]
"""Option name -> what the command line gave for it; an option that was not given is missing."""


def with_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a Typer command take these options of a node.

    The command's first parameter must be its `typer.Context`; under `call.obj` it finds the `Given` of the options
    before and after its name. Of one given in both places the one after counts.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapper(call: typer.Context, **values: Any) -> None:
            given = {name: value for name in names if (value := values.pop(name)) not in (None, [])}
            call.obj = {**(call.obj or {}), **given}
            command(call, **values)

        own = inspect.signature(command, eval_str=True)
        parameters = [*own.parameters.values(), *map(_parameter, names)]
        wrapper.__signature__ = own.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapper

    return decorate


def _parameter(name: str) -> inspect.Parameter:
    """An option as Typer wants it: values stay text, `config.py` reads them as it reads the environment's."""
    option, flag = OPTIONS[name], flag_name(name)
    if option.value:
        kind = list[str] | None if option.repeatable else str | None
        info = typer.Option(flag, help=option.help, metavar=option.value)
    else:
        kind = bool | None
        info = typer.Option(f"{flag}/--no-{flag[2:]}", help=option.help)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, info])
