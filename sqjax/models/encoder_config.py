"""`EncoderConfig`: what an encoder of texts computes, as data.

The defaults are those of a BERT. Its blocks are a decoder's, whose tokens look both ways.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sqjax.models.config import ACTIVATIONS, DecoderConfig, LayerKind, Norm
from sqjax.models.fields import (
    COUNT,
    FLAG,
    SIZE,
    SIZE_OR_NONE,
    What,
    check,
    check_fields,
    instance_of,
    one_of,
    tuple_of,
)

#: How a block adds attention and MLP; see `EncoderConfig.block`.
ENCODER_BLOCKS = ("sum", "pre")

_BERT_NORM = Norm("layer", 1e-12, bias=True)
_NO_ROPE = (LayerKind(None, None),)


@dataclass(frozen=True)
class EncoderConfig:
    """What an encoder computes. Hashable, so that it may be a static argument of `jax.jit`.

    Attributes:
        vocab_size: the number of tokens.
        hidden_size: channels of the residual stream.
        intermediate_size: channels between the matmuls of an MLP.
        num_layers: the number of blocks.
        num_heads: heads of queries, keys and values; they divide the hidden size.
        attention_bias: whether q, k, v and the output projection have a bias.
        mlp_bias: whether the MLP's matmuls have one.
        max_length: the longest text that the model was made for.
        norm: every norm.
        embedding_norm: whether one follows the embedding.
        final_norm: whether one follows the last block.
        block: how a block adds attention A and MLP M to x, with norms N:
            "sum": x = N(x + A(x)), then x = N(x + M(x)) (BERT);
            "pre": x += A(N x), then x += M(N x) (ModernBERT).
        first_norm: whether layer 0 has a norm before its attention (in ModernBERT it has none).
        kinds: how the attention of each layer looks around; one stands for all layers. With a
            window of n, a token looks at n // 2 tokens on either side.
        causal: whether a token looks at itself and at those before it alone, as in CLIP's texts.
        learned_positions: whether each position's row of a table is added to the embedding.
        position_offset: the row of position 0 in that table.
        skips_padding: whether positions count the tokens whose id is not `pad_id`, whatever the
            mask says, as in RoBERTa; else they count all.
        token_types: the rows of a table of which a token's type picks the one that is added; None
            for no table.
        distance_buckets: scores have a number added that a table holds for the distance from query
            to key, of so many rows, which far distances share; a column for each head. None for no
            table (MPNet has one, which all layers share).
        gated_mlp: down(act(gate(x)) * up(x)); if not, down(act(up(x))).
        activation: one of `sqjax.models.config.ACTIVATIONS`.
        pad_id: the token that fills a text.

    Raises:
        ValueError: a field is not what it must be, or fields do not go together.

    Examples:
        >>> from sqjax.models import EncoderConfig
        >>> EncoderConfig(64, 32, 48, num_layers=2, num_heads=4).head_dim
        8
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    attention_bias: bool = True
    mlp_bias: bool = True
    max_length: int = 512
    norm: Norm = _BERT_NORM
    embedding_norm: bool = True
    final_norm: bool = False
    block: str = "sum"
    first_norm: bool = True
    kinds: tuple[LayerKind, ...] = _NO_ROPE
    causal: bool = False
    learned_positions: bool = True
    position_offset: int = 0
    skips_padding: bool = False
    token_types: int | None = None
    distance_buckets: int | None = None
    gated_mlp: bool = False
    activation: str = "gelu"
    pad_id: int = 0

    def __post_init__(self):
        check_fields(self, _FIELDS)
        _check_sizes(self)
        try:
            # What kinds and heads must be is checked there.
            _ = self.layers
        except ValueError as error:
            said = str(error).replace("DecoderConfig.", "EncoderConfig.")
            raise ValueError(said) from error

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.num_heads

    @cached_property
    def layers(self) -> DecoderConfig:
        """The blocks, as those of a decoder whose tokens look both ways."""
        return DecoderConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.head_dim,
            attention_bias=self.attention_bias,
            output_bias=self.attention_bias,
            mlp_bias=self.mlp_bias,
            max_length=self.max_length,
            norm=self.norm,
            block=self.block,
            first_norm=self.first_norm,
            kinds=tuple(replace(kind, both_ways=True) for kind in self.kinds),
            gated_mlp=self.gated_mlp,
            activation=self.activation,
        )


def _are_buckets(x: Any) -> bool:
    # A fourth of them are for near distances, of which 128 would leave none for far ones.
    return x is None or (SIZE.holds(x) and x % 4 == 0 and x <= 256)


_FIELDS: Mapping[str, What] = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_layers": SIZE,
    "num_heads": SIZE,
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "max_length": SIZE,
    "norm": instance_of(Norm, "a Norm"),
    "embedding_norm": FLAG,
    "final_norm": FLAG,
    "block": one_of(*ENCODER_BLOCKS),
    "first_norm": FLAG,
    "kinds": tuple_of(LayerKind, "a tuple of LayerKinds"),
    "causal": FLAG,
    "learned_positions": FLAG,
    "position_offset": COUNT,
    "skips_padding": FLAG,
    "token_types": SIZE_OR_NONE,
    "distance_buckets": What(
        "a multiple of 4 from 4 to 256, or none", _are_buckets
    ),
    "gated_mlp": FLAG,
    "activation": one_of(*ACTIVATIONS),
    "pad_id": COUNT,
}


def _check_sizes(config: EncoderConfig) -> None:
    """Raises ValueError if heads do not divide channels, or a table of rows would be too long."""
    if config.hidden_size % config.num_heads:
        raise ValueError(
            "EncoderConfig.hidden_size: expected a multiple of num_heads = "
            f"{config.num_heads}, got {config.hidden_size}"
        )
    if config.pad_id >= config.vocab_size:
        raise ValueError(
            f"EncoderConfig.pad_id: expected a token id below vocab_size = {config.vocab_size}, "
            f"got {config.pad_id}"
        )
    rows = config.max_length + config.position_offset
    check("EncoderConfig.max_length", rows, SIZE)
