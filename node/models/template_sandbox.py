"""Running a model file's chat template without trusting it.

jinja2's immutable sandbox keeps a template away from Python's internals. This module adds a budget: every
turn of a loop, every call and every character put out is paid for, and the operators, methods and filters
that make much out of little are bounded, so that a runaway template is ended within about a second. What this
does not promise: a fixed wall-clock time (one built-in may work over all that the caller passed in, at every
step), so callers bound the conversation and render in a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, NoReturn, cast

from jinja2 import Template, TemplateSyntaxError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from swarmd.node.models.template_limits import (
    BOUNDED_FILTERS,
    MAX_TEXT,
    TemplateError,
    bounded_strftime,
    check_method,
    check_power,
    check_product,
    length_of,
    refuse,
    weighed,
)

MAX_STEPS = 200_000
"""Turns of loops plus calls that one rendering may take."""
MAX_NODES = 4096
"""Parts of a template's syntax tree. Those of templates in use are one for ten characters; jinja2 takes about 10 KB and
a tenth of a millisecond to compile one."""
# Not an identifier, so no template can name, replace or refill it.
_BUDGET = "swarmd budget"
# Filters that chat templates do not need and that build much from a number.
_REMOVED_FILTERS = ("batch", "center", "format", "slice", "urlize", "wordwrap", "xmlattr", "pprint", "random")


class Budget:
    """What one rendering may still spend."""

    def __init__(self, characters: int) -> None:
        self._steps = MAX_STEPS
        self._characters = characters

    def step(self) -> None:
        """Pay for one turn of a loop or one call; raises TemplateError when there is nothing left."""
        self._steps -= 1
        if self._steps < 0:
            raise TemplateError(f"the model's chat template took more than {MAX_STEPS} steps and was stopped")

    def emit(self, characters: int) -> None:
        """Pay for text put out; raises TemplateError when there is nothing left."""
        self._characters -= characters
        if self._characters < 0:
            raise TemplateError("the model's chat template wrote far more text than it was given and was stopped")


class _Counted:
    """An iterable whose turns are paid for."""

    def __init__(self, iterable: Any, budget: Budget) -> None:
        self._iterable = iterable
        self._budget = budget

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            self._budget.step()
            yield item

    def __len__(self) -> int:
        return len(self._iterable)


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}`: marks the assistant's tokens for training, means nothing
    here."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a plain attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment Hugging Face's `apply_chat_template` documents (trim_blocks, lstrip_blocks, loop
    controls, plain `tojson`, `raise_exception`, `strftime_now`), with the budget of this module built in."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
        for name in _REMOVED_FILTERS:
            self.filters.pop(name, None)
        self.filters.update(
            BOUNDED_FILTERS,
            swarmd_counted=_counted,
            swarmd_emitted=_emitted,
            swarmd_bounded=_bounded,
        )
        self.globals.update(raise_exception=_raise_exception, strftime_now=lambda form: bounded_strftime(now(), form))
        self.globals.pop("lipsum", None)

    def compile_counted(self, source: str) -> Template:
        """Compile with every loop, output and concatenation paid for. Raises jinja2.TemplateSyntaxError, also for more
        than MAX_NODES, and what Python's compiler raises."""
        tree = self.parse(source)
        if sum(1 for _ in tree.find_all(nodes.Node)) > MAX_NODES:
            raise TemplateSyntaxError(f"it has more than {MAX_NODES} parts", 1)
        for loop in list(tree.find_all(nodes.For)):
            if loop.recursive:
                raise TemplateSyntaxError("recursive loops are not supported", loop.lineno)
            loop.iter = _filtered(loop.iter, "swarmd_counted")
        for output in list(tree.find_all(nodes.Output)):
            output.nodes = [_filtered(node, "swarmd_emitted") for node in output.nodes]
        _bound_concatenations(tree)
        return self.from_string(tree)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 - jinja2's
        _budget(context).step()
        method = getattr(obj, "__wrapped__", obj)  # jinja2 wraps str.format
        if isinstance(owner := getattr(method, "__self__", None), str):
            check_method(owner, method.__name__, args, kwargs)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: D102 - jinja2's
        if operator == "*":
            check_product(left, right)
        elif operator == "**":
            check_power(left, right)
        elif operator == "%" and isinstance(left, str):
            check_method(left, "format", (right,), {})
        elif operator == "+" and length_of(left) + length_of(right) > MAX_TEXT:
            refuse("a huge string")
        return super().call_binop(context, operator, left, right)

    def render_counted(self, template: Template, characters: int, variables: dict[str, Any]) -> str:
        """Render, putting out at most `characters` (text captured by `set` blocks and macros counts as
        well)."""
        return template.render({**variables, _BUDGET: Budget(characters)})


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(cast("nodes.Expr", node), name, [], [], None, None, lineno=node.lineno)


def _bound_concatenations(node: nodes.Node) -> None:
    """Wrap each `a ~ b` below `node`, which jinja2 gives no other way to watch."""
    for field, value in node.iter_fields():
        children = value if isinstance(value, list) else [value]
        for child in children:
            if isinstance(child, nodes.Node):
                _bound_concatenations(child)
        wrapped = [_filtered(c, "swarmd_bounded") if isinstance(c, nodes.Concat) else c for c in children]
        setattr(node, field, wrapped if isinstance(value, list) else wrapped[0])


def _budget(context: Context) -> Budget:
    return context.parent[_BUDGET]


@pass_context
def _counted(context: Context, value: Any) -> Iterable[Any]:
    return _Counted(value, _budget(context)) if hasattr(value, "__len__") else iter(_Counted(value, _budget(context)))


@pass_context
def _emitted(context: Context, value: Any) -> str:
    text = value if isinstance(value, str) else str(weighed(value))
    _budget(context).emit(len(text))
    return text


@pass_context
def _bounded(context: Context, value: str) -> str:
    _budget(context).step()
    return weighed(value)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(f"the model's chat template refuses this conversation: {message}")
