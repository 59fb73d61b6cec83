"""Chat templates: from messages to the text that a model was trained to continue."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqjax.models.fields import TEXT, What, check
from sqjax.models.text.packages import templates_module

#: The names that checkpoints give to their templates: the usual one, and the one with tools.
DEFAULT, TOOL_USE = "default", "tool_use"


class Template(NamedTuple):
    """A Jinja template.

    Attributes:
        text: its source.
        where: where it was found, for messages of errors.
    """

    text: str
    where: str


@dataclass(frozen=True)
class Templates:
    """The chat templates of a checkpoint.

    Attributes:
        named: {name: template}; the usual one is "default".
        tokens: the texts of special tokens that a template may name: {"bos_token": "<s>", ...}.
    """

    named: Mapping[str, Template] = field(default_factory=dict)
    tokens: Mapping[str, Any] = field(default_factory=dict)


def render_chat(
    templates: Templates,
    messages: Any,
    *,
    template: str | None,
    tools: Any,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
) -> str:
    """The text of a conversation.

    Args:
        templates: the checkpoint's.
        messages: a list of {"role": ..., "content": ...}.
        template: the name of one of them, or the source of another; None for the usual one.
        tools: JSON schemas of functions that the model may call; None for none.
        add_generation_prompt: whether to end with what begins the model's answer.
        variables: what else the template reads.

    Raises:
        ValueError: messages that are none, no such template, or a template that refuses the
            messages, is none, or asks for what the sandbox does not give.
        ImportError: if `jinja2` is not installed.
    """
    check_messages(messages)
    check("tools", tools, _TOOLS)
    chosen = _choose(templates.named, template, with_tools=bool(tools))
    given = {
        **templates.tokens,
        "documents": None,
        **variables,
        "messages": messages,
        "tools": tools,
        "add_generation_prompt": add_generation_prompt,
    }
    sandbox = templates_module()
    try:
        return sandbox.render(chosen.text, given)
    except sandbox.ComplaintError as error:
        raise ValueError(
            f"{chosen.where}: the chat template refuses these messages: {error}"
        ) from error
    # A template is a program, which may fail in any way.
    except Exception as error:
        kind = type(error).__name__
        raise ValueError(
            f"{chosen.where}: the chat template can not be rendered: {kind}: {error}; "
            "give another one as template="
        ) from error


def _choose(
    named: Mapping[str, Template], template: str | None, with_tools: bool
) -> Template:
    """The template of this name, or this source; without either the usual one."""
    if template is None:
        return _usual(named, with_tools)
    check("template", template, TEXT)
    if template in named:
        return named[template]
    # A source without a brace would say the same for all messages.
    if "{" in template:
        return Template(template, "template")
    raise ValueError(
        f"template: expected one of {sorted(named)}, or Jinja's source, got {template!r}"
    )


def _usual(named: Mapping[str, Template], with_tools: bool) -> Template:
    """The template for tools where there are some, or else the usual one."""
    if with_tools and TOOL_USE in named:
        return named[TOOL_USE]
    if DEFAULT in named:
        return named[DEFAULT]
    if named:
        raise ValueError(
            f"chat: this checkpoint has no usual template; name one of {sorted(named)} "
            "as template="
        )
    raise ValueError(
        "chat: this checkpoint has no chat template (a model that was not trained for chats has "
        "none); give one as template="
    )


# What messages must be --------------------------------------------------------------------------


def check_messages(messages: Any) -> None:
    """Raises ValueError unless this is a list of messages, each {"role": ..., "content": ...}."""
    check("messages", messages, _MESSAGES)
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        check(where, message, _MESSAGE)
        check(f"{where}: role", message.get("role"), _ROLE)
        # An assistant that calls a tool need not say anything.
        if not message.get("tool_calls"):
            check(f"{where}: content", message.get("content"), _CONTENT)


def _is_list(x: Any) -> bool:
    return isinstance(x, Sequence) and not isinstance(x, str | bytes)


def _is_some_list(x: Any) -> bool:
    return _is_list(x) and len(x) > 0


def _are_mappings(x: Any) -> bool:
    return _is_list(x) and all(isinstance(entry, Mapping) for entry in x)


_MESSAGES = What(
    'a list such as [{"role": "user", "content": "Hi"}]', _is_some_list
)
_MESSAGE = What(
    '{"role": ..., "content": ...}', lambda x: isinstance(x, Mapping)
)
_ROLE = What("a text such as 'user'", TEXT.holds)
_CONTENT = What(
    "a text, or a list of parts", lambda x: TEXT.holds(x) or _are_mappings(x)
)
_TOOLS = What(
    "a list of JSON schemas, or none", lambda x: x is None or _are_mappings(x)
)
