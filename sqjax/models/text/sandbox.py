"""Renders a chat template as transformers does: in Jinja's sandbox, with the same few additions.

Imported only where a template is rendered, because `jinja2` is optional.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ComplaintError(Exception):
    """What a template says of the messages, by its own ``raise_exception``."""


def render(text: str, variables: Mapping[str, Any]) -> str:
    """The text that a template makes of its variables.

    Raises:
        ComplaintError: the template refuses the messages.
        Exception: it is no template, or asks for what the sandbox does not give.
    """
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _complain
    environment.globals["strftime_now"] = _now
    return environment.from_string(text).render(**variables)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which asking for something unsafe is an error at once.

    Jinja itself gives an undefined value, which prints as nothing and raises when it is used.
    """

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(
            f"{attribute!r} of a {type(obj).__name__} is not for templates"
        )


class _Generation(Extension):
    """The tag ``{% generation %}``: it marks what a model wrote, and changes no text."""

    def __init__(self, environment):
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(
            ("name:endgeneration",), drop_needle=True
        )
        # What the body sets ends with it, as in the macro that transformers makes of it.
        return nodes.Scope(body).set_lineno(line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: Jinja's own filter would escape it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _complain(message: Any) -> NoReturn:
    raise ComplaintError(str(message))


def _now(form: str) -> str:
    return datetime.now().strftime(form)
