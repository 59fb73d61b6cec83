"""`DecoderConfig`: what a decoder computes, as data. A family of models is a choice of its fields.

The defaults are those of a Llama. The parts that only some families have are frozen dataclasses of
their own: `Norm`, `Rope` with its scaling, `LayerKind`, `Experts`, `LatentAttention`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter

from sqjax.models.fields import (
    EPSILON,
    FLAG,
    POSITIVE,
    POSITIVE_OR_NONE,
    SIZE,
    SIZE_OR_NONE,
    What,
    check,
    check_fields,
    instance_of,
    one_of,
    tuple_of,
)
from sqjax.models.rope import LongRope, Rope

#: How a block adds attention and MLP to the residual stream; see `DecoderConfig.block`.
BLOCKS = (
    "pre",
    "output",
    "sandwich",
    "sum",
    "scaled",
    "parallel",
    "parallel_two",
)
#: The functions between an MLP's matmuls; "gelu_tanh" is the approximation that GPT-2 takes,
#: "quick_gelu" that of CLIP, x * sigmoid(1.702 x).
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2")


@dataclass(frozen=True)
class Norm:
    """A norm over the channels.

    Attributes:
        kind: "rms", x / sqrt(mean(x^2) + eps) * weight; or "layer", which subtracts the mean first.
        eps: added to the mean square, or the variance.
        bias: whether a "layer" norm adds one.
        one_plus: whether the gain is 1 + weight, as in Gemma, and not weight.
    """

    kind: str = "rms"
    eps: float = 1e-5
    bias: bool = False
    one_plus: bool = False

    def __post_init__(self):
        kinds = one_of("rms", "layer")
        fields = {"kind": kinds, "eps": EPSILON, "bias": FLAG, "one_plus": FLAG}
        check_fields(self, fields)


_USUAL_ROPE = Rope()


@dataclass(frozen=True)
class LayerKind:
    """How the attention of some layers looks around.

    Attributes:
        sliding_window: a token looks at so many latest tokens, itself included; None for all.
        rope: the rotary embedding of queries and keys; None for none.
        both_ways: whether a token looks at later tokens too, as in an encoder. Then a window of n
            means n // 2 tokens on either side.
    """

    sliding_window: int | None = None
    rope: Rope | None = _USUAL_ROPE
    both_ways: bool = False

    def __post_init__(self):
        rope = instance_of(Rope, "a Rope or None", none=True)
        fields = {"sliding_window": SIZE_OR_NONE, "rope": rope}
        check_fields(self, {**fields, "both_ways": FLAG})


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of one MLP: a router chooses some experts for each token.

    Attributes:
        count: the number of experts.
        per_token: how many of them see a token.
        intermediate_size: the hidden size of one expert.
        normalized: whether the chosen experts' weights are divided by their sum.
        scale: what the weights are multiplied by then.
        groups: experts stand in so many groups.
        groups_kept: only the experts of so many groups may be chosen, those with the best expert.
        shared_size: the hidden size of an MLP that sees every token beside them; None for none.
        shared_gate: whether the shared MLP's output is multiplied by the sigmoid of one logit.
        dense_layers: the layers, by number, that have one MLP as if there were no experts.
    """

    count: int
    per_token: int
    intermediate_size: int
    normalized: bool = True
    scale: float = 1.0
    groups: int = 1
    groups_kept: int = 1
    shared_size: int | None = None
    shared_gate: bool = False
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self):
        check_fields(self, _EXPERTS_FIELDS)
        allowed = self.count // self.groups * self.groups_kept
        too_many = self.per_token > allowed or self.groups_kept > self.groups
        if self.count % self.groups or too_many:
            raise ValueError(
                "Experts.per_token: expected groups that divide the experts, no more groups kept "
                "than there are, and at most as many experts a token as these have, got "
                f"{self.per_token} of {self.count} in {self.groups_kept} of {self.groups} groups"
            )


_EXPERTS_FIELDS = {
    "count": SIZE,
    "per_token": SIZE,
    "intermediate_size": SIZE,
    "normalized": FLAG,
    "scale": POSITIVE,
    "groups": SIZE,
    "groups_kept": SIZE,
    "shared_size": SIZE_OR_NONE,
    "shared_gate": FLAG,
    "dense_layers": tuple_of(int, "a tuple of the numbers of layers"),
}


_LATENT_NORM = Norm(eps=1e-6)


@dataclass(frozen=True)
class LatentAttention:
    """Keys and values that all heads make from one short vector of the token (DeepSeek-V2's MLA).

    ``head_dim`` is then `plain_size` + `rotary_size`: only the last channels of a head turn with
    the position, and those of the keys are the same for all heads.

    Attributes:
        rank: the length of that vector.
        plain_size: how many channels of a head do not turn.
        rotary_size: how many do.
        value_size: the channels of a value's head.
        query_rank: the length of a vector that queries are made of; None: they are made of x.
        norm: the norm of these vectors.
    """

    rank: int
    plain_size: int
    rotary_size: int
    value_size: int
    query_rank: int | None = None
    norm: Norm = _LATENT_NORM

    def __post_init__(self):
        sizes = ("rank", "plain_size", "rotary_size", "value_size")
        fields = dict.fromkeys(sizes, SIZE)
        fields |= {
            "query_rank": SIZE_OR_NONE,
            "norm": instance_of(Norm, "a Norm"),
        }
        check_fields(self, fields)


@dataclass(frozen=True)
class DecoderConfig:
    """What a decoder computes. Hashable, so that it may be a static argument of `jax.jit`.

    Attributes:
        vocab_size: the number of tokens.
        hidden_size: channels of the residual stream.
        intermediate_size: channels between the matmuls of an MLP.
        num_layers: the number of blocks.
        num_heads: query heads.
        num_kv_heads: key/value heads; consecutive query heads share one.
        head_dim: channels of a query's or a key's head.
        tie_embeddings: whether the head is the embedding matrix.
        attention_bias: whether q, k and v have a bias.
        output_bias: whether the attention's output projection has one.
        mlp_bias: whether the MLP's matmuls have one.
        head_bias: whether the head has one.
        max_length: the longest sequence that the model was made for.
        norm: every norm over the hidden size.
        final_norm: whether there is one after the last block.
        block: how a block adds attention A and MLP M to x, with norms N:
            "pre": x += A(N x), then x += M(N x) (Llama, GPT-2);
            "output": x += N A(x), then x += N M(x) (OLMo-2);
            "sandwich": x += N A(N x), then x += N M(N x) (Gemma 2);
            "sum": x = N(x + A(x)), then x = N(x + M(x)) (OPT-350m);
            "scaled": x += g A(N x), then x += h M(N x), with gains g and h for each channel
                (DINOv2);
            "parallel": x += A(N x) + M(N x), with one norm for both (GPT-J);
            "parallel_two": the same with a norm each (GPT-NeoX).
        first_norm: whether layer 0 has a norm before its attention; without one that layer reads a
            normed embedding (ModernBERT).
        kinds: how the attention of each layer looks back; one stands for all layers.
        qk_norm: a norm of queries and keys before they turn: None; "head", over each head's
            channels, with one gain for all heads; "heads", with a gain for each head; "all", over
            all heads' channels together.
        qk_norm_kind: which norm that is.
        latent: keys and values made from one short vector; None for the usual ones.
        query_scale: what q k^T is multiplied by; None for 1 / sqrt(head_dim).
        attention_softcap: scores x become cap * tanh(x / cap); None for none.
        alibi: scores have slope * distance added instead of a rotary embedding, where the slopes
            are those of ALiBi (Press et al. 2022) times this number; None for none.
        learned_positions: whether each position's row of a table is added to the embedding.
        position_offset: the row of position 0 in that table.
        gated_mlp: down(act(gate(x)) * up(x)); if not, down(act(up(x))).
        activation: one of `ACTIVATIONS`.
        experts: a mixture of experts in place of the MLP; None for none.
        embedding_size: channels of the embedding where they are not the hidden size: two matmuls
            go from one to the other. None where they are.
        embedding_scale: what embeddings are multiplied by.
        embedding_norm: whether a norm follows the embedding.
        residual_scale: what A and M are multiplied by before they are added.
        logit_scale: what logits are multiplied by.
        logit_softcap: logits x become cap * tanh(x / cap); None for none.

    Raises:
        ValueError: a field is not what it must be, or fields do not go together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tie_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    max_length: int = 2048
    norm: Norm = Norm()
    final_norm: bool = True
    block: str = "pre"
    first_norm: bool = True
    kinds: tuple[LayerKind, ...] = (LayerKind(),)
    qk_norm: str | None = None
    qk_norm_kind: Norm = Norm()
    latent: LatentAttention | None = None
    query_scale: float | None = None
    attention_softcap: float | None = None
    alibi: float | None = None
    learned_positions: bool = False
    position_offset: int = 0
    gated_mlp: bool = True
    activation: str = "silu"
    experts: Experts | None = None
    embedding_size: int | None = None
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def __post_init__(self):
        check_fields(self, _FIELDS)
        _check_positions(self)
        _check_heads(self)
        _check_kinds(self)
        _check_directions(self)
        _check_latent(self)

    def kind(self, layer: int) -> LayerKind:
        """How the attention of a layer looks back."""
        return self.kinds[layer if len(self.kinds) > 1 else 0]

    def has_first_norm(self, layer: int) -> bool:
        """Whether a layer has the norm before its attention that its block names."""
        return self.first_norm or layer > 0

    @property
    def both_ways(self) -> bool:
        """Whether tokens look at later ones too."""
        return self.kinds[0].both_ways

    @property
    def different_kinds(self) -> tuple[LayerKind, ...]:
        """The kinds without repetition, in the order of the first layers that have them."""
        return tuple(dict.fromkeys(self.kinds))

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts in place of one MLP."""
        experts = self.experts
        return experts is not None and layer not in experts.dense_layers

    @property
    def keys_change_after(self) -> int | None:
        """The length beyond which all keys of a text are others; None for models without one."""
        for kind in self.different_kinds:
            scaling = getattr(kind.rope, "scaling", None)
            if isinstance(scaling, LongRope):
                return scaling.original_length
        return None

    @property
    def value_dim(self) -> int:
        """Channels of a value's head."""
        return self.latent.value_size if self.latent else self.head_dim


_FIELDS: Mapping[str, What] = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_layers": SIZE,
    "num_heads": SIZE,
    "num_kv_heads": SIZE,
    "head_dim": SIZE,
    "tie_embeddings": FLAG,
    "attention_bias": FLAG,
    "output_bias": FLAG,
    "mlp_bias": FLAG,
    "head_bias": FLAG,
    "max_length": SIZE,
    "norm": instance_of(Norm, "a Norm"),
    "final_norm": FLAG,
    "block": one_of(*BLOCKS),
    "first_norm": FLAG,
    "kinds": tuple_of(LayerKind, "a tuple of LayerKinds"),
    "qk_norm": one_of(None, "head", "heads", "all"),
    "qk_norm_kind": instance_of(Norm, "a Norm"),
    "latent": instance_of(
        LatentAttention, "a LatentAttention or None", none=True
    ),
    "query_scale": POSITIVE_OR_NONE,
    "attention_softcap": POSITIVE_OR_NONE,
    "alibi": POSITIVE_OR_NONE,
    "learned_positions": FLAG,
    "position_offset": instance_of(int, "a whole number"),
    "gated_mlp": FLAG,
    "activation": one_of(*ACTIVATIONS),
    "experts": instance_of(Experts, "an Experts or None", none=True),
    "embedding_size": SIZE_OR_NONE,
    "embedding_scale": POSITIVE,
    "embedding_norm": FLAG,
    "residual_scale": POSITIVE,
    "logit_scale": POSITIVE,
    "logit_softcap": POSITIVE_OR_NONE,
}


def _check_positions(config: DecoderConfig) -> None:
    """Raises ValueError if the table of positions would be longer than an array can be."""
    rows = config.max_length + config.position_offset
    check("DecoderConfig.max_length", rows, SIZE)


def _check_heads(config: DecoderConfig) -> None:
    # Each key head serves as many query heads.
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            "DecoderConfig.num_heads: expected a multiple of num_kv_heads = "
            f"{config.num_kv_heads}, got {config.num_heads}"
        )


def _check_kinds(config: DecoderConfig) -> None:
    """Raises ValueError unless every layer has a kind, and kinds turn the same channels."""
    if len(config.kinds) not in (1, config.num_layers):
        raise ValueError(
            "DecoderConfig.kinds: expected one LayerKind for all layers, or one for each of "
            f"{config.num_layers}, got {len(config.kinds)}"
        )
    turned = rotated_channels(config)
    for rope in config_ropes(config):
        if rope.channels(turned) % 2 or rope.channels(turned) > turned:
            raise ValueError(
                "DecoderConfig.head_dim: expected an even number of channels that turn in pairs, "
                f"at most {turned}, got {rope.channels(turned)}"
            )
        _check_factors(rope, turned)
    # A stack of layers is scanned: all its layers run one program.
    layouts = {
        (r.channels(turned), r.interleaved) for r in config_ropes(config)
    }
    if len(layouts) > 1:
        raise ValueError(
            "DecoderConfig.kinds: expected ropes that turn the same channels in the same pairs, "
            f"got (channels, interleaved) {sorted(layouts)}"
        )
    has_window = any(map(attrgetter("sliding_window"), config.kinds))
    if config.alibi is not None and has_window:
        raise ValueError(
            "DecoderConfig.alibi: expected no sliding window beside it, got one"
        )


def _check_directions(config: DecoderConfig) -> None:
    if len({kind.both_ways for kind in config.kinds}) != 1:
        raise ValueError(
            "DecoderConfig.kinds: expected both_ways to be the same in all, got both"
        )


def _check_factors(rope: Rope, turned: int) -> None:
    """Raises ValueError unless a LongRope has a factor above 0 for each pair of channels."""
    scaling = rope.scaling
    if not isinstance(scaling, LongRope):
        return
    pairs = rope.channels(turned) // 2
    for factors in (scaling.short, scaling.long):
        if len(factors) != pairs or min(factors) <= 0:
            raise ValueError(
                f"LongRope: expected {pairs} factors above 0, one for each pair of channels, got "
                f"{len(factors)}, the smallest {min(factors, default=None)}"
            )


def _check_latent(config: DecoderConfig) -> None:
    latent = config.latent
    if latent is None:
        return
    size = latent.plain_size + latent.rotary_size
    if config.head_dim != size or config.num_kv_heads != config.num_heads:
        raise ValueError(
            f"DecoderConfig.latent: expected head_dim = plain_size + rotary_size = {size} and "
            f"num_kv_heads = num_heads = {config.num_heads}, got {config.head_dim} and "
            f"{config.num_kv_heads}"
        )


def config_ropes(config: DecoderConfig) -> list[Rope]:
    """The rotary embeddings of all kinds that have one."""
    kinds = config.different_kinds
    return [kind.rope for kind in kinds if kind.rope is not None]


def rotated_channels(config: DecoderConfig) -> int:
    """The channels of a head that a rotary embedding may turn."""
    return config.latent.rotary_size if config.latent else config.head_dim


def llama_config(
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rope_theta: float = 10000.0,
    rms_norm_eps: float = 1e-5,
    tie_embeddings: bool = False,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    max_length: int = 2048,
    sliding_window: int | None = None,
) -> DecoderConfig:
    """The `DecoderConfig` of a Llama, whose few choices are said flat.

    Args:
        rope_theta: the base of the rotary embedding.
        rms_norm_eps: added to the mean square in every norm.
        attention_bias: whether q, k, v and the output projection have a bias.
        sliding_window: a token looks at so many latest tokens, in every layer; None for all.

        The other arguments are fields of `DecoderConfig`.

    Raises:
        ValueError: as `DecoderConfig`.

    Examples:
        >>> from sqjax.models import llama_config
        >>> llama_config(32, 8, 16, 3, 2, 1, 4, rope_theta=1e6).kinds[0].rope.theta
        1000000.0
    """
    return DecoderConfig(
        vocab_size,
        hidden_size,
        intermediate_size,
        num_layers,
        num_heads,
        num_kv_heads,
        head_dim,
        tie_embeddings=tie_embeddings,
        attention_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=mlp_bias,
        max_length=max_length,
        norm=Norm(eps=rms_norm_eps),
        kinds=(LayerKind(sliding_window, Rope(rope_theta)),),
    )
