"""`Tokenizer`: text to token ids and back, and conversations to prompts."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sqjax.models.text.chat import Templates, render_chat

#: How a text ends that stops inside a character.
_HALF = "\ufffd"


@dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer`, with what its checkpoint says of special tokens and of chats.

    Attributes:
        backend: the `tokenizers.Tokenizer`.
        eos_id: the id that ends a text; None if the checkpoint has none.
        more_ends: other ids that end one too.
        bos_id: the id that begins a text; None if the checkpoint has none.
        pad_id: the id that fills a text; None if the checkpoint has none.
        templates: the checkpoint's chat templates.
        tidies: whether `decode` takes spaces before punctuation away, as the checkpoint asks for.
    """

    backend: Any
    eos_id: int | None
    more_ends: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None
    templates: Templates = field(default_factory=Templates)
    tidies: bool = False

    @property
    def ends(self) -> tuple[int, ...]:
        """All ids that end a text."""
        first = () if self.eos_id is None else (self.eos_id,)
        return (*first, *self.more_ends)

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, with the special tokens the checkpoint asks for.

        Raises:
            ValueError: it is no text, or not one of Unicode (half of a surrogate pair is in it).
        """
        check_text(text, "encode")
        return self.backend.encode(text).ids

    def decode(self, ids: Iterable) -> str:
        """The text of token ids, special tokens left out."""
        text = self.backend.decode(
            list(map(int, ids)), skip_special_tokens=True
        )
        return _tidy(text) if self.tidies else text

    def decode_new(self, ids: Iterable, shown: str) -> str:
        """The text of token ids after what was shown of it, for a text that is still written.

        A token may end inside a character: the start of a character waits for its end.

            ids, shown = [], ""

            def show(row, tokens):
                nonlocal shown
                ids.extend(tokens)
                new = tokenizer.decode_new(ids, shown)
                shown += new
                print(new, end="", flush=True)

            sqjax.models.generate(model, params, prompt, 64, stream=show)
        """
        return self.decode(ids).rstrip(_HALF)[len(shown) :]

    def chat(
        self,
        messages: Any,
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
        tools: Any = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, by the checkpoint's chat template.

        For the ids that a model reads take `encode_chat`: the text may hold the token already that
        `encode` would put before it.

        Args:
            messages: a list such as ``[{"role": "user", "content": "Hi"}]``.
            add_generation_prompt: whether to end with what begins the model's answer.
            template: the name of one of the checkpoint's templates, or the source of another;
                None for its usual one, or its one for tools where there are tools.
            tools: JSON schemas of functions that the model may call.
            **variables: what else the template reads, such as ``enable_thinking=False``.

        Raises:
            ValueError: messages that are none, a checkpoint without a template, or a template that
                refuses the messages, or asks for what it must not have; names its file.
            ImportError: if `jinja2` is not installed.

        Examples:
            >>> from sqjax.models.tokenizer import Tokenizer
            >>> tokenizer = Tokenizer(backend=None, eos_id=None)
            >>> source = "{{ messages[0].role }}: {{ messages[0].content }}"
            >>> tokenizer.chat([{"role": "user", "content": "Hi"}], template=source)
            'user: Hi'
        """
        return render_chat(
            self.templates,
            messages,
            template=template,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            variables=variables,
        )

    def encode_chat(
        self,
        messages: Any,
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
        tools: Any = None,
        **variables: Any,
    ) -> list[int]:
        """The token ids of a conversation: those of `chat`, and none before or after them.

        What begins a text is written by the template.

        Raises:
            ValueError: as `chat`.
            ImportError: if `jinja2` is not installed.
        """
        text = self.chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            template=template,
            tools=tools,
            **variables,
        )
        check_text(text, "encode_chat")
        return self.backend.encode(text, add_special_tokens=False).ids


def check_text(text: Any, where: str) -> None:
    """Raises ValueError, naming `where`, if this is no text, or one that has no UTF-8 form."""
    if not isinstance(text, str):
        raise ValueError(f"{where}: expected a text, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: expected a text of Unicode, got half of a surrogate pair at "
            f"{error.start}; decode the text's bytes as UTF-8"
        ) from error


#: What is written apart by a tokenizer of words, and what stands in a text.
_TIDIED = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def _tidy(text: str) -> str:
    for apart, together in _TIDIED:
        text = text.replace(apart, together)
    return text


def with_ids(
    backend: Any,
    begins: Iterable[int | None],
    ends: Iterable[int | None],
    fills: Iterable[int | None],
    **more: Any,
) -> Tokenizer:
    """A tokenizer whose texts end with any of some ids.

    Args:
        backend: the `tokenizers.Tokenizer`.
        begins: ids, of which the first is its `bos_id`; None for none.
        ends: ids, of which the first is its `eos_id`, some of them perhaps twice.
        fills: ids, of which the first is its `pad_id`.
        **more: further attributes of the tokenizer.
    """
    first, *others = [*_known(ends), None]
    return Tokenizer(
        backend,
        first,
        tuple(_known(others)),
        bos_id=[*_known(begins), None][0],
        pad_id=[*_known(fills), None][0],
        **more,
    )


def _known(ids: Iterable[int | None]) -> list[int]:
    """Those ids that there are, each once."""
    # A dict keeps the order.
    return [i for i in dict.fromkeys(ids) if i is not None]
