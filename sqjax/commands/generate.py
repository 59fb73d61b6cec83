"""`sqjax generate`: a model's answer, token by token."""

import sys
import time
from typing import Any

import click

from sqjax.commands.options import CACHES, MODEL, Number, Talk, Whole, command

_EXAMPLES = """
sqjax generate smollm2-135m "Why is the sky blue?"
sqjax generate smollm2-w8a8 "The capital of France is" --raw --max-tokens 16
sqjax generate smollm2-w8a8 "Tell me a story." --temperature 0.8 --top-p 0.95 --seed 7
sqjax generate smollm2-w8a8 - < prompt.txt
"""


@command(
    "generate",
    _EXAMPLES,
    MODEL,
    click.argument("prompt", metavar="PROMPT"),
    click.option(
        "--max-tokens",
        type=Whole(1),
        default=128,
        show_default=True,
        help="The largest number of new tokens.",
    ),
    click.option(
        "--chat/--raw",
        default=None,
        help="Whether the prompt is a message of a chat, put into the model's chat template, or a "
        "text to go on with.  [default: a chat if the model has a template]",
    ),
    click.option(
        "--temperature",
        type=Number(0),
        default=0.0,
        show_default=True,
        help="0 for the likeliest token every time.",
    ),
    click.option(
        "--top-k", type=Whole(1), help="Draw among so many likeliest."
    ),
    click.option(
        "--top-p",
        type=Number(0, 1, min_open=True),
        help="Draw among the fewest likeliest that have this share.",
    ),
    click.option(
        "--seed",
        type=int,
        default=0,
        show_default=True,
        help="Of the draws.",
    ),
    click.option(
        "--cache",
        type=click.Choice(CACHES),
        default="float",
        show_default=True,
        help="How keys and values are stored.",
    ),
)
def generate(
    talk: Talk,
    model: str,
    dtype: str,
    prompt: str,
    max_tokens: int,
    chat: bool | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    cache: str,
) -> None:
    """Let MODEL answer PROMPT, and print the text as it comes.

    A PROMPT of - is read from stdin.
    """
    if prompt == "-":
        talk.note("reading the prompt from stdin")
        prompt = sys.stdin.read()
    from sqjax.commands.model_argument import open_decoder
    from sqjax.models import generate as continued

    opened = open_decoder(model, dtype, talk)
    ids, is_chat = _prompt_ids(opened.model.tokenizer, prompt, chat)
    # The library would refuse it too, but knows no option to name.
    _check_room(opened.model, ids, max_tokens)
    writer = _Writer(opened.model.tokenizer, talk)
    kind = "a chat" if is_chat else "a text to go on with"
    talk.note(f"{kind}; compiling before the first token")
    # Compiling counts, because a person waits for it too.
    start = time.perf_counter()
    made = continued(
        opened.model,
        opened.params,
        [ids],
        max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        cache=cache,
        stream=writer,
    )
    seconds = time.perf_counter() - start
    [tokens], [stopped] = made.tokens, made.stopped
    record = {
        "model": model,
        "prompt": prompt,
        "chat": is_chat,
        "text": writer.shown,
        "tokens": len(tokens),
        "stopped": stopped,
        "seconds": round(seconds, 3),
    }
    # People have seen the text already; only the end of its line is missing.
    talk.result(record, "")
    talk.note(f"{len(tokens)} tokens in {seconds:.1f} s, compiling included")


class _Writer:
    """Writes new text to stdout as tokens come; for --json it only keeps it."""

    def __init__(self, tokenizer: Any, talk: Talk):
        self.tokenizer = tokenizer
        self.talk = talk
        self.ids: list[int] = []
        self.shown = ""

    def __call__(self, row: int, tokens: list[int]) -> None:
        """Called by `sqjax.models.generate` with the new tokens."""
        self.ids += tokens
        # Of all ids, because a letter may take several tokens.
        new = self.tokenizer.decode_new(self.ids, self.shown)
        self.shown += new
        if not self.talk.json:
            click.echo(new, nl=False)


def _prompt_ids(
    tokenizer: Any, prompt: str, chat: bool | None
) -> tuple[list[int], bool]:
    """The ids of a prompt, and whether it was put into a chat template.

    Raises:
        ValueError: it is empty, or a chat is asked for of a model without a template.
    """
    if not prompt:
        raise ValueError("PROMPT: expected a text, got an empty one")
    # A model that was trained on chats answers nothing else well.
    is_chat = bool(tokenizer.templates.named) if chat is None else chat
    if not is_chat:
        return tokenizer.encode(prompt), False
    message = {"role": "user", "content": prompt}
    return tokenizer.encode_chat([message]), True


def _check_room(model: Any, ids: list[int], steps: int) -> None:
    """Raises ValueError, naming the option, if the answer would be too long for the model."""
    most = model.config.max_length
    if len(ids) + steps > most:
        raise ValueError(
            f"--max-tokens: the prompt has {len(ids)} tokens, and the model takes {most} in all: "
            f"expected at most {most - len(ids)}, got {steps}"
        )
