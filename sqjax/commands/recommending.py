"""The work of `sqjax recommend`: recipes tried on a decoder, by the loss of the next token."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sqjax import models
from sqjax._tables import aligned
from sqjax.choosing.recommend import Recommendation, recommend
from sqjax.commands.model_argument import Opened
from sqjax.commands.options import Talk
from sqjax.commands.quantizing import TIED


def recommended(
    opened: Opened,
    ids: Int[np.ndarray, "windows tokens"],
    percent: float,
    talk: Talk,
) -> Recommendation:
    """The recipes tried on these windows, the last quarter of which judges: two at least."""
    if len(ids) < 3:
        raise ValueError(
            f"recommend: expected 3 windows of text or more, 2 of which judge, got {len(ids)}; "
            "give more text, or more --windows"
        )
    # One window a batch: the interval is that of windows.
    batches = [jnp.asarray(window)[None] for window in ids]
    return recommend(
        opened.model.apply,
        opened.params,
        batches,
        # A perplexity p% higher is a loss that is log(1 + p / 100) higher.
        budget=math.log1p(percent / 100),
        loss=next_token_loss,
        logits=True,
        floats=_floats(opened),
        progress=talk.progress,
    )


def _floats(opened: Opened) -> tuple[str, ...]:
    """The head, where it is the embedding too: int4 rows of it would be looked up as well."""
    return (TIED,) if opened.model.config.tie_embeddings else ()


def next_token_loss(
    logits: Float[Array, "batch tokens vocab"], _: Any, ids: Array
) -> Float[Array, ""]:
    """The mean loss of each token after the first, in nats."""
    logprobs = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    # What follows each token but the last, which nothing here follows.
    following = ids[:, 1:, None]
    return -jnp.mean(jnp.take_along_axis(logprobs, following, axis=-1))


def write(new: Path, opened: Opened, found: Recommendation) -> None:
    """Writes the recommended model."""
    models.save(new, opened.model, found.params, like=opened.directory)


def record(
    found: Recommendation, text: str, output: Path | None
) -> dict[str, Any]:
    """What was found, for machines."""
    tried = [
        {
            "recipe": one.name,
            "weight_bytes": one.nbytes,
            "perplexity": math.exp(one.loss),
            "loss_difference": one.difference,
            "interval": one.interval,
        }
        for one in found.tried
    ]
    written = None if output is None or found.name is None else str(output)
    return {
        "recommended": found.name,
        "budget": found.budget,
        "float_perplexity": math.exp(found.float_loss),
        "float_bytes": found.float_bytes,
        "tried": tried,
        "text": text,
        "output": written,
    }


def text_of(found: Recommendation, percent: float, output: Path | None) -> str:
    """What was found, for people."""
    rows: list[tuple[str, ...]] = [
        ("", "size", "perplexity", "more than float", "")
    ]
    size = f"{found.float_bytes / 1e6:.0f} MB"
    rows.append(("", size, f"{math.exp(found.float_loss):.3f}", "", "float"))
    for one in found.tried:
        star = "*" if one.name == found.name else ""
        more = 100 * math.expm1(one.difference)
        spread = 100 * one.interval
        cells = f"{one.nbytes / 1e6:.0f} MB", f"{math.exp(one.loss):.3f}"
        rows.append((star, *cells, f"{more:+.2f}% +- {spread:.2f}%", one.name))
    lines = aligned(rows, left={4})
    if found.name is None:
        lines.append(
            f"no recipe is within {percent:g}%: accept more with --budget, or judge on more "
            "windows with --windows"
        )
    else:
        lines.append(f"the smallest within {percent:g}%: {found.name}")
    if output is not None and found.name is not None:
        lines.append(f"written to {output}")
    return "\n".join(lines)
