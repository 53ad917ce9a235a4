"""A Jinja environment for templates that come with a model and are not trusted: no way out, no endless work.

Jinja's sandbox keeps a template from reaching Python's insides. It does not bound what a template costs, so on top of
it every loop turn and macro call counts against a budget with a deadline, and nothing may grow beyond a size: neither
the output nor a value on the way to it.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_OUTPUT_CHARS = 8 * 1024 * 1024
MAX_STEPS = 1_000_000
MAX_SECONDS = 5.0
# Widths and repetitions in a template are layout: columns, indents, rules. None needs more.
MAX_INTEGER = 100_000
_WIDE_FORMAT = re.compile(r"\{[^{}]*(\d{6}|\{)")
_WIDE_PERCENT = re.compile(r"\d{6}|\*")


class LimitError(jinja2.TemplateError):
    """A template asked for more time or space than any honest one needs."""


class _Budget(threading.local):
    """What the rendering under way in this thread has left."""

    steps = 0
    deadline = float("inf")

    def start(self) -> None:
        self.steps = 0
        self.deadline = time.monotonic() + MAX_SECONDS

    def spend(self) -> str:
        self.steps += 1
        if self.steps > MAX_STEPS or time.monotonic() > self.deadline:
            raise LimitError("the template takes too long")
        return ""


class _Generation(Extension):
    """{% generation %} … {% endgeneration %} marks text for training; here it is the text alone."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """What transformers' chat templates expect to find, within bounds."""

    intercepted_binops = frozenset(("+", "*", "**", "%", "//", "/", "-"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            finalize=_printable,
        )
        self.budget = _Budget()
        self.filters["tojson"] = _tojson
        for name, function in list(self.filters.items()):
            self.filters[name] = _bounded_filter(name, function)
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        # Builds long text out of nothing, and no chat template needs it.
        self.globals.pop("lipsum", None)

    concat = staticmethod(lambda parts: "".join(list(_within_output(parts))))

    def compile_template(self, source: str) -> jinja2.Template:
        """Raises jinja2.TemplateError, or RecursionError for absurd nesting."""
        tree = self.parse(source)
        _count_steps(tree, self)
        code = self.compile(tree)
        return jinja2.Template.from_code(self, code, self.make_globals(None))

    def spend_step(self) -> str:
        return self.budget.spend()

    def join_values(self, *values: Any) -> str:
        """The `~` operator."""
        return "".join(list(_within_output([str(_printable(value)) for value in values])))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and _WIDE_FORMAT.search(value.__self__):
            raise LimitError("the template formats with a width that is too large or computed")
        return wrapped

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_repetition(left, right)
            _check_repetition(right, left)
        elif operator == "**" and (abs(left) > MAX_INTEGER or abs(right) > 64):
            raise LimitError("the template computes a number that is too large")
        elif operator == "%" and isinstance(left, str) and _WIDE_PERCENT.search(left):
            raise LimitError("the template formats with a width that is too large or computed")
        return _bounded(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, (str, list, tuple, dict)):
            _check_call(name, owner, args, kwargs)
        return _bounded(super().call(__context, __obj, *args, **kwargs))


def _count_steps(tree: nodes.Template, environment: jinja2.Environment) -> None:
    """Put a call that spends one step into every loop and macro body, and bound every `~`."""
    for kind in (nodes.For, nodes.Macro, nodes.CallBlock):
        for loop in tree.find_all(kind):
            body: list[nodes.Node] = getattr(loop, "body")  # noqa: B009 - find_all's type is that of all nodes
            spend = nodes.Call(nodes.EnvironmentAttribute("spend_step"), [], [], None, None)
            step = nodes.ExprStmt(spend, lineno=loop.lineno)
            step.set_environment(environment)
            body.insert(0, step)
    _replace_concat(tree, environment)


def _replace_concat(node: nodes.Node, environment: jinja2.Environment) -> None:
    for field, value in node.iter_fields():
        if isinstance(value, list):
            setattr(node, field, [_without_concat(item, environment) for item in value])
        elif isinstance(value, nodes.Node):
            setattr(node, field, _without_concat(value, environment))


def _without_concat(node: Any, environment: jinja2.Environment) -> Any:
    if not isinstance(node, nodes.Node):
        return node
    _replace_concat(node, environment)
    if not isinstance(node, nodes.Concat):
        return node
    call = nodes.Call(nodes.EnvironmentAttribute("join_values"), node.nodes, [], None, None, lineno=node.lineno)
    call.set_environment(environment)
    return call


def _bounded(value: Any) -> Any:
    """Refuse text, bytes and sequences that have grown beyond what a prompt can be."""
    if isinstance(value, (str, bytes, list, tuple)) and len(value) > MAX_OUTPUT_CHARS:
        raise LimitError("the template makes a text that is too long")
    if isinstance(value, int) and value.bit_length() > 4096:
        raise LimitError("the template computes a number that is too large")
    return value


def _within_output(parts: Iterable[str], extra: int = 0) -> Iterator[str]:
    total = 0
    for part in parts:
        total += len(part) + extra
        if total > MAX_OUTPUT_CHARS:
            raise LimitError("the template makes a text that is too long")
        yield part


def _check_repetition(sequence: Any, count: Any) -> None:
    repeats = isinstance(sequence, (str, bytes, list, tuple)) and isinstance(count, int)
    if repeats and len(sequence) * count > MAX_OUTPUT_CHARS:
        raise LimitError("the template makes a text that is too long")


def _check_call(name: str, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What a method or filter may be asked to do. Checked before, because one step can multiply two lengths."""
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, int) and abs(argument) > MAX_INTEGER:
            raise LimitError(f"the template calls {name} with a number that is too large")
    if name == "replace" and isinstance(owner, str) and len(args) >= 2:
        old, new = str(args[0]), str(args[1])
        if owner.count(old) * max(0, len(new) - len(old)) > MAX_OUTPUT_CHARS:
            raise LimitError("the template makes a text that is too long")
    if name == "join":
        separator, parts = (owner, args[0]) if isinstance(owner, str) and args else (args[0] if args else "", owner)
        if isinstance(parts, (list, tuple)):
            _check_joined(str(separator), parts)
    if name == "format" and isinstance(owner, str) and _WIDE_PERCENT.search(owner):
        raise LimitError("the template formats with a width that is too large or computed")
    if name in ("indent", "wordwrap") and isinstance(owner, str):
        width = max((arg for arg in (*args, *kwargs.values()) if isinstance(arg, int)), default=4)
        if owner.count("\n") * max(1, width) > MAX_OUTPUT_CHARS:
            raise LimitError("the template makes a text that is too long")
    if name == "translate":
        raise LimitError("the template calls translate, which is not allowed")


def _check_joined(separator: str, parts: list[Any] | tuple[Any, ...]) -> None:
    total = len(separator) * len(parts)
    total += sum(len(part) if isinstance(part, str) else 1 for part in parts)
    if total > MAX_OUTPUT_CHARS:
        raise LimitError("the template makes a text that is too long")


def _printable(value: Any) -> Any:
    """What is put out, or serialised. A few lists that hold each other many times would print as gigabytes."""
    if isinstance(value, (list, tuple, dict)):
        _weigh(value, MAX_OUTPUT_CHARS)
    return value


def _weigh(value: Any, left: int) -> int:
    """What is left of `left` characters after printing `value`, roughly; stops at nothing left."""
    if left <= 0:
        raise LimitError("the template makes a text that is too long")
    if isinstance(value, str):
        return left - len(value)
    left -= 1
    if isinstance(value, dict):
        for key, item in value.items():
            left = _weigh(item, _weigh(key, left))
    elif isinstance(value, (list, tuple)):
        for item in value:
            left = _weigh(item, left)
    return left


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same filter with its arguments and result checked."""
    pass_arg = getattr(function, "jinja_pass_arg", None)

    def bounded(*args: Any, **kwargs: Any) -> Any:
        first = 0 if pass_arg is None else 1
        if name == "join" and len(args) > first:
            # Lists can be measured beforehand, generators cannot.
            args = (*args[:first], list(args[first]), *args[first + 1 :])
        own = args[first:]
        if own:
            _printable(own[0])
            _check_call(name, own[0], own[1:], kwargs)
        return _bounded(function(*args, **kwargs))

    # Jinja looks for its marks (which context to pass, whether the filter is asynchronous) on the function.
    bounded.__dict__.update(getattr(function, "__dict__", {}))
    return bounded


def _raise_exception(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: Jinja's own escapes HTML, which would put &#39; into prompts."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(str(form)[:200])
