"""Rotary embeddings: by which angles pairs of channels turn, and how longer texts change that.

Pair i of d channels turns by position * theta^(-2i / d) radians (Su et al. 2021, arXiv
2104.09864). With d = 4 and theta = 10000 there are two pairs: at position 3 pair 0 turns by 3, and
pair 1 by 3 / 100. A scaling makes these frequencies smaller, so that a longer text turns the pairs
no further than the model has seen; five are in use. The formulas are those of the papers, with the
defaults of the `transformers` package.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sqjax.models.fields import (
    FLAG,
    POSITIVE,
    SIZE,
    SIZE_OR_NONE,
    check_fields,
    instance_of,
    tuple_of,
)


@dataclass(frozen=True)
class Linear:
    """Every frequency divided by `factor` (Chen et al. 2023, arXiv 2306.15595)."""

    factor: float

    def __post_init__(self):
        check_fields(self, {"factor": POSITIVE})


@dataclass(frozen=True)
class Dynamic:
    """A larger theta for a longer text, from `original_length` tokens on ("dynamic NTK").

    With n tokens, theta grows by (factor * n / original_length - (factor - 1))^(d / (d - 2)).
    """

    factor: float
    original_length: int

    def __post_init__(self):
        check_fields(self, {"factor": POSITIVE, "original_length": SIZE})


@dataclass(frozen=True)
class Llama3:
    """Slow pairs divided by `factor`, fast ones left, and those between interpolated.

    A pair is slow if it turns fewer than `low` times in `original_length` tokens, and fast if it
    turns more than `high` times.
    """

    factor: float
    low: float
    high: float
    original_length: int

    def __post_init__(self):
        fields = dict.fromkeys(("factor", "low", "high"), POSITIVE)
        check_fields(self, {**fields, "original_length": SIZE})
        if self.low >= self.high:
            raise ValueError(
                "Llama3.low: expected a number below high = "
                f"{self.high}, got {self.low}"
            )


@dataclass(frozen=True)
class Yarn:
    """As `Llama3`, with a ramp over the pairs' numbers (Peng et al. 2023, arXiv 2309.00071).

    Attributes:
        factor: what slow pairs are divided by.
        original_length: how many tokens the model was trained on.
        fast, slow: pairs that turn more often than `fast` in so many tokens stay as they are, and
            those that turn less often than `slow` are divided by the whole factor.
        attention_factor: what cosines and sines are multiplied by.
        truncate: whether the ramp begins and ends at whole numbers of pairs.
    """

    factor: float
    original_length: int
    fast: float = 32.0
    slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True

    def __post_init__(self):
        numbers = ("factor", "fast", "slow", "attention_factor")
        fields = dict.fromkeys(numbers, POSITIVE)
        check_fields(
            self, {**fields, "original_length": SIZE, "truncate": FLAG}
        )


@dataclass(frozen=True)
class LongRope:
    """Each pair's frequency divided by a factor of its own (Ding et al. 2024, arXiv 2402.13753).

    Attributes:
        short: the factors of the pairs while a text has at most `original_length` tokens.
        long: those for longer texts.
        original_length: how many tokens the model was trained on.
        attention_factor: what cosines and sines are multiplied by.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_length: int
    attention_factor: float = 1.0

    def __post_init__(self):
        factors = tuple_of(float, "a tuple of numbers")
        fields = {"short": factors, "long": factors}
        fields["original_length"] = SIZE
        check_fields(self, {**fields, "attention_factor": POSITIVE})


Scaling = Linear | Dynamic | Llama3 | Yarn | LongRope


@dataclass(frozen=True)
class Rope:
    """A rotary embedding.

    Attributes:
        theta: the base of the frequencies.
        size: how many of a head's first channels turn; None for all.
        interleaved: whether channels 2i and 2i + 1 are pair i, as in GPT-J. If not, the pairs are
            channel i of the first half and channel i of the second, as in Llama.
        scaling: how frequencies change for longer texts; None for not at all.
    """

    theta: float = 10000.0
    size: int | None = None
    interleaved: bool = False
    scaling: Scaling | None = None

    def __post_init__(self):
        scaling = instance_of(
            Scaling, "a scaling of sqjax.models.rope or None", none=True
        )
        check_fields(
            self,
            {
                "theta": POSITIVE,
                "size": SIZE_OR_NONE,
                "interleaved": FLAG,
                "scaling": scaling,
            },
        )

    def channels(self, head_dim: int) -> int:
        """How many channels of a head turn."""
        return head_dim if self.size is None else self.size


class RotaryTable(NamedTuple):
    """Cosine and sine of the angle by which each pair of channels turns, for some positions."""

    cos: Float[Array, "rows tokens half"]
    sin: Float[Array, "rows tokens half"]


def rotary_table(
    positions: Int[Array, "rows tokens"],
    rope: Rope | None,
    channels: int,
    longest: Int[Array, ""],
    dtype: DTypeLike,
) -> RotaryTable:
    """Cosine and sine for positions; the angles are computed in float32.

    Args:
        positions: of the tokens in their rows.
        rope: which embedding; None turns nothing: every cosine is 1 and every sine 0.
        channels: how many channels of a head turn.
        longest: the number of tokens of the longest row so far, by which some scalings choose.
        dtype: of the result.
    """
    shape = (*positions.shape, channels // 2)
    if rope is None:
        return RotaryTable(jnp.ones(shape, dtype), jnp.zeros(shape, dtype))
    frequencies = jnp.asarray(_frequencies(rope, channels, longest))
    wide = positions.astype(jnp.float32)[:, :, None]
    angles = wide * frequencies[None, None, :]
    factor = getattr(rope.scaling, "attention_factor", 1.0)
    cos = jnp.cos(angles) * jnp.float32(factor)
    sin = jnp.sin(angles) * jnp.float32(factor)
    table = RotaryTable(cos.astype(dtype), sin.astype(dtype))
    # So that it is computed once: XLA would compute it again for every layer that reads it.
    return lax.optimization_barrier(table)


def rotate(
    x: Float[Array, "batch tokens heads head_dim"],
    table: RotaryTable,
    interleaved: bool = False,
) -> Float[Array, "batch tokens heads head_dim"]:
    """Turns each pair of channels by its angle: (a, b) to (a cos t - b sin t, b cos t + a sin t).

    The pairs are those of `Rope.interleaved`. With 8 channels, and a table for 3 pairs, pairs are
    (0, 3), (1, 4), (2, 5), or interleaved (0, 1), (2, 3), (4, 5); channels 6 and 7 stay. Then the
    product of a query and a key depends on their positions by the difference alone.
    """
    half = table.cos.shape[-1]
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    # One angle serves all heads of a token.
    cos = table.cos[:, :, None, :]
    sin = table.sin[:, :, None, :]
    if interleaved:
        pairs = turning.reshape(*turning.shape[:-1], half, 2)
        left, right = pairs[..., 0], pairs[..., 1]
    else:
        left, right = turning[..., :half], turning[..., half:]
    turned = [left * cos - right * sin, right * cos + left * sin]
    if interleaved:
        joined = jnp.stack(turned, axis=-1).reshape(turning.shape)
    else:
        joined = jnp.concatenate(turned, axis=-1)
    if rest.shape[-1] == 0:
        return joined
    return jnp.concatenate([joined, rest], axis=-1)


def _frequencies(rope: Rope, channels: int, longest: Array) -> Any:
    """How far each pair turns from one position to the next, in radians, float32.

    In numpy and float64 where nothing depends on the text, so that no backend rounds otherwise.
    """
    exponents = np.arange(0, channels, 2) / channels
    plain = float(rope.theta) ** -exponents
    match rope.scaling:
        case None:
            scaled = plain
        case Linear(factor):
            scaled = plain / factor
        case Llama3() as scaling:
            scaled = _llama3(plain, scaling)
        case Yarn() as scaling:
            scaled = _yarn(plain, rope.theta, channels, scaling)
        case LongRope(short, long, original_length):
            either = plain / np.array(short), plain / np.array(long)
            small, large = (f.astype(np.float32) for f in either)
            return jnp.where(longest > original_length, large, small)
        case Dynamic() as scaling:
            growth = _dynamic(scaling, channels, longest)
            return plain.astype(np.float32) * growth ** -exponents.astype(
                np.float32
            )
    return scaled.astype(np.float32)


def llama3_factors(rope: Rope, channels: int) -> np.ndarray:
    """By what `Llama3` divides the frequency of each pair: from 1 to the whole factor."""
    assert isinstance(rope.scaling, Llama3)
    exponents = np.arange(0, channels, 2) / channels
    plain = float(rope.theta) ** -exponents
    return plain / _llama3(plain, rope.scaling)


def _llama3(plain: np.ndarray, scaling: Llama3) -> np.ndarray:
    """Frequencies by how often a pair turns in the original length."""
    turns = scaling.original_length * plain / (2 * np.pi)
    # 0 for a slow pair, 1 for a fast one.
    kept = (turns - scaling.low) / (scaling.high - scaling.low)
    kept = np.clip(kept, 0, 1)
    return (1 - kept) * plain / scaling.factor + kept * plain


def _yarn(
    plain: np.ndarray, theta: float, channels: int, scaling: Yarn
) -> np.ndarray:
    """Frequencies by the pair's number: a ramp from the last fast pair to the first slow one."""

    def pair_that_turns(times: float) -> float:
        """The number of the pair that turns so many times in the original length."""
        radians = times * 2 * math.pi
        exponent = math.log(scaling.original_length / radians)
        return channels * exponent / (2 * math.log(theta))

    first = pair_that_turns(scaling.fast)
    last = pair_that_turns(scaling.slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, channels - 1)
    if first == last:
        last += 0.001  # no division by 0
    ramp = np.clip((np.arange(channels // 2) - first) / (last - first), 0, 1)
    return plain / scaling.factor * ramp + plain * (1 - ramp)


def _dynamic(scaling: Dynamic, channels: int, longest: Array) -> Array:
    """By what theta grows for a text of so many tokens; 1 up to the original length."""
    length = jnp.maximum(longest, scaling.original_length).astype(jnp.float32)
    beyond = scaling.factor * length / scaling.original_length
    # At the original length this is 1.
    growth = beyond - (scaling.factor - 1)
    return growth ** jnp.float32(channels / max(channels - 2, 1))
