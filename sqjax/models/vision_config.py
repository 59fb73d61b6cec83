"""`VisionConfig`: what an image encoder computes, as data. A family is a choice of its fields."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from sqjax.models.config import ACTIVATIONS, DecoderConfig, LayerKind, Norm
from sqjax.models.fields import (
    FLAG,
    LARGEST_SIZE,
    SIZE,
    SIZE_OR_NONE,
    What,
    check_fields,
    instance_of,
    one_of,
)

#: How the tokens of an image become one vector; see `VisionConfig.pooling`.
POOLINGS = (None, "class", "attention")
#: The functions after a pooler's matmul.
POOLER_ACTIVATIONS = ("tanh", *ACTIVATIONS)

#: Attention compares each patch with each other. Usual images have some hundreds.
MOST_PATCHES = 2**16

_VIT_NORM = Norm("layer", 1e-12, bias=True)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """What an image encoder computes. Hashable, so that it may be a static argument of `jax.jit`.

    An image is cut into square patches, each of which becomes a token. With an image size of 224
    and patches of 16 there are 14 * 14 tokens, and one more with a class token. Rows and columns
    that do not fill a patch are left out: of 384 pixels patches of 14 leave out the last 6.

    Attributes:
        image_size: rows, and columns, of an image.
        patch_size: rows, and columns, of a patch.
        num_channels: channels of an image: 3 for RGB.
        hidden_size: channels of the residual stream.
        intermediate_size: channels between the matmuls of an MLP.
        num_layers: the number of blocks.
        num_heads: heads of queries, keys and values; they divide the hidden size.
        attention_bias: whether q, k and v have a bias; the output projection has one.
        norm: every norm.
        activation: one of `sqjax.models.config.ACTIVATIONS`.
        gated_mlp: down(act(gate(x)) * up(x)); if not, down(act(up(x))).
        layer_scale: whether what a block adds has a gain for each channel (DINOv2).
        patch_bias: whether the matmul of the patches has a bias.
        class_token: whether a learned token stands before those of the patches.
        embedding_norm: whether a norm follows the embedding (CLIP).
        final_norm: what is normed after the last layer: "tokens", all of them (ViT, SigLIP); or
            "pooled", only the vector that is made of them (CLIP).
        pooling: how the tokens become one vector: "class", the class token; "attention", a learned
            query looks at all tokens, and an MLP follows (SigLIP); None: they do not.
        pooler_size: the outputs of a matmul of that vector (ViT); None for none.
        pooler_activation: the function after it, one of `POOLER_ACTIVATIONS`.
        projection_size: the outputs of a last matmul, without a bias, into the space that images
            and texts share (CLIP); None for none.
        num_classes: the classes that a head tells apart; None where there is no head.
        class_and_mean: whether that head reads the mean of the patches' tokens beside the class
            token (DINOv2).

    Raises:
        ValueError: a field is not what it must be, or fields do not go together.

    Examples:
        >>> from sqjax.models import VisionConfig
        >>> config = VisionConfig(
        ...     image_size=12, patch_size=4, hidden_size=8, intermediate_size=16, num_layers=1,
        ...     num_heads=2,
        ... )
        >>> config.patches, config.tokens
        (9, 10)
    """

    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_channels: int = 3
    attention_bias: bool = True
    norm: Norm = _VIT_NORM
    activation: str = "gelu"
    gated_mlp: bool = False
    layer_scale: bool = False
    patch_bias: bool = True
    class_token: bool = True
    embedding_norm: bool = False
    final_norm: str = "tokens"
    pooling: str | None = "class"
    pooler_size: int | None = None
    pooler_activation: str = "tanh"
    projection_size: int | None = None
    num_classes: int | None = None
    class_and_mean: bool = False

    def __post_init__(self):
        check_fields(self, _FIELDS)
        _check_sizes(self)
        _check_pooling(self)

    @cached_property
    def layers(self) -> DecoderConfig:
        """The blocks, as those of a decoder whose tokens look both ways."""
        return DecoderConfig(
            # It has neither an embedding nor a head.
            vocab_size=1,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.hidden_size // self.num_heads,
            attention_bias=self.attention_bias,
            output_bias=True,
            mlp_bias=True,
            norm=self.norm,
            kinds=(LayerKind(None, None, both_ways=True),),
            gated_mlp=self.gated_mlp,
            activation=self.activation,
            block="scaled" if self.layer_scale else "pre",
        )

    @property
    def patches(self) -> int:
        """How many patches an image has."""
        # What is left of a row or a column is in none.
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """How many tokens an image becomes."""
        return self.patches + self.class_token


_FIELDS: Mapping[str, What] = {
    "image_size": SIZE,
    "patch_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_layers": SIZE,
    "num_heads": SIZE,
    "num_channels": SIZE,
    "attention_bias": FLAG,
    "norm": instance_of(Norm, "a Norm"),
    "activation": one_of(*ACTIVATIONS),
    "gated_mlp": FLAG,
    "layer_scale": FLAG,
    "patch_bias": FLAG,
    "class_token": FLAG,
    "embedding_norm": FLAG,
    "final_norm": one_of("tokens", "pooled"),
    "pooling": one_of(*POOLINGS),
    "pooler_size": SIZE_OR_NONE,
    "pooler_activation": one_of(*POOLER_ACTIVATIONS),
    "projection_size": SIZE_OR_NONE,
    "num_classes": SIZE_OR_NONE,
    "class_and_mean": FLAG,
}


def _check_sizes(config: VisionConfig) -> None:
    """Raises ValueError unless an image has a patch, and heads divide the channels."""
    if config.hidden_size % config.num_heads:
        raise ValueError(
            "VisionConfig.hidden_size: expected a multiple of num_heads = "
            f"{config.num_heads}, got {config.hidden_size}"
        )
    if config.patch_size > config.image_size:
        raise ValueError(
            "VisionConfig.patch_size: expected at most the image size "
            f"{config.image_size}, got {config.patch_size}"
        )
    if config.patches > MOST_PATCHES:
        raise ValueError(
            f"VisionConfig.image_size: expected at most {MOST_PATCHES} patches, got "
            f"{config.patches} of {config.patch_size} x {config.patch_size}"
        )
    numbers = config.image_size**2 * config.num_channels
    if numbers > LARGEST_SIZE:
        raise ValueError(
            f"VisionConfig.image_size: expected an image of at most {LARGEST_SIZE} numbers, got "
            f"{config.image_size} x {config.image_size} x {config.num_channels}"
        )


def _check_pooling(config: VisionConfig) -> None:
    """Raises ValueError for a part that would read what the model does not compute."""
    reads_class = config.pooling == "class" or config.num_classes is not None
    if reads_class and not config.class_token:
        raise ValueError(
            "VisionConfig.class_token: expected one, because the pooling or the head of classes "
            "reads it, got none"
        )
    sizes = config.pooler_size, config.projection_size
    if config.final_norm == "pooled" and config.pooling != "class":
        raise ValueError(
            "VisionConfig.final_norm: expected 'tokens', because only a class token is normed "
            f"after it was picked, got 'pooled' and the pooling {config.pooling!r}"
        )
    if config.pooling is None and sizes != (None, None):
        raise ValueError(
            "VisionConfig.pooling: expected one for the matmuls that follow it, got None"
        )
