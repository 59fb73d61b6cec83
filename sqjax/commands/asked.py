"""What options ask for, as the functions that do it take it; without jax."""

from pathlib import Path
from typing import NamedTuple


class Asked(NamedTuple):
    """What the options say of calibration.

    Attributes:
        text: what is read; None for the shipped text.
        tokens, windows: how much of it; None for the usual.
        stats: a file with statistics, in place of all of these.
        search: whether what a search reads is kept: Gram matrices and samples of tokens.
        sample: whether samples alone are kept, for static ranges of rotated activations.
    """

    text: Path | None
    tokens: int | None
    windows: int | None
    stats: Path | None = None
    search: bool = False
    sample: bool = False


class How(NamedTuple):
    """What is asked for.

    Attributes:
        layout: "sqjax", "compressed-tensors" or "gguf".
        scheme: of all matmuls that no rule is of.
        rules: {pattern: scheme, or "none"}, the first that is found wins.
        alpha: the smoothing strength, or "none".
        search: whether scales and roundings are searched for, in place of that.
    """

    layout: str
    scheme: str
    rules: dict[str, str]
    alpha: float | str
    search: bool = False

    @property
    def needs_statistics(self) -> bool:
        """Whether calibration matters: a GGUF file that is not smoothed knows no activations."""
        return self.layout != "gguf" or self.alpha != "none"
