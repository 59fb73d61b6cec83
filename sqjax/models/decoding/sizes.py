"""The sizes that the programs of `generate` are compiled for: few, so that few are compiled."""

from typing import NamedTuple

import jax

from sqjax.models.model import Params
from sqjax.weights.quant_weight import is_quantized

#: Lengths of prompts and numbers of steps are rounded up to a multiple of it, because each length
#: has a program of its own, which takes longer to compile than to run.
BUCKET = 64


class Sizes(NamedTuple):
    """The sizes that programs are compiled for.

    Attributes:
        tokens: the length that prompts are padded to.
        chunk: how many of them are read at once; it divides `tokens`.
        room: new tokens that there is room for.
    """

    tokens: int
    chunk: int
    room: int


def program_sizes(
    longest: int, steps: int, chunk: int | None, most: int, exact: bool
) -> Sizes:
    """The sizes for prompts of at most `longest` tokens: many lengths have the same.

    With 70 tokens and 5 steps of a model of 2048 tokens they are (128, 128, 64), and with a chunk
    of 50 they are (100, 50, 64).

    Args:
        longest: the tokens of the longest prompt.
        steps: the new tokens that are asked for.
        chunk: how many tokens may be read at once; None for all.
        most: the model's length, beyond which nothing is rounded up.
        exact: whether padding would change results, so that there is none beside the longest.
    """
    room = min(_rounded_up(steps, BUCKET), most)
    at_once = min(_rounded_up(longest, 1 if exact else BUCKET), most)
    # A larger chunk would be mostly padding.
    if chunk is None or chunk >= at_once:
        return Sizes(at_once, at_once, room)
    return Sizes(_rounded_up(longest, chunk), int(chunk), room)


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def share_a_scale(params: Params) -> bool:
    """Whether some activations have one scale for all rows: then padding has a say in it."""
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    return any(
        getattr(leaf, "activations", None) == "per_tensor" for leaf in leaves
    )
