"""What several commands use: the texts that come with the package, the bytes of a tree."""

from importlib import resources
from numbers import Real

import jax
import numpy as np

from sqjax.models import Model
from sqjax.models.evaluation.perplexity import windows

#: What a command that reads texts says of a model without a tokenizer.
NO_TOKENIZER = (
    "this command measures texts: expected a model with a tokenizer, got one without; "
    "name a checkpoint that has one"
)


def shipped(name: str) -> str:
    """A text that comes with the package: "calibration" or "evaluation"."""
    return (
        resources.files("sqjax.commands") / "text" / f"{name}.txt"
    ).read_text(encoding="utf-8")


def text_windows(
    model: Model, name: str, length: int, count: int
) -> np.ndarray:
    """The first `count` windows of `length` tokens of a shipped text, (count, length).

    Raises:
        ValueError: the model has no tokenizer, or the text is too short.
    """
    if model.tokenizer is None:
        raise ValueError(NO_TOKENIZER)
    return windows(model.tokenizer.encode(shipped(name)), length, count)


def check_alpha(alpha: float) -> None:
    """Raises ValueError unless this is a smoothing strength.

    Commands ask before they load a model, because the answer should not take minutes.
    """
    if not isinstance(alpha, Real) or not 0 <= alpha <= 1:
        raise ValueError(
            f"alpha: expected a smoothing strength from 0 to 1, got {alpha!r}"
        )


def check_length(model: Model, tokens: int, what: str) -> None:
    """Raises ValueError, saying what for, if a model takes fewer tokens than a command reads."""
    most = model.config.max_length
    if tokens > most:
        raise ValueError(
            f"this command reads {what} of {tokens} tokens: expected a model that takes as many, "
            f"got one of {most} (config.max_length); name another model"
        )


def where(model_name: str) -> str:
    """The model, the device and the version of jax: the first line that a command prints."""
    return f"{model_name} on {jax.devices()[0].platform}, jax {jax.__version__}"
