"""`Family`: how the checkpoints of one family of models are read, as data.

    QWEN2 = Family(
        model_type="qwen2",
        fields={**LLAMA_FIELDS, "attention_bias": True, "output_bias": False},
        rows=LLAMA_ROWS,
    )

says that config.json is read as a Llama's but for two fields, and that tensors have a Llama's
names.
"""

import dataclasses
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from sqjax.models.checkpoints.kinds import KINDS, Config
from sqjax.models.checkpoints.names import Found, Row, find
from sqjax.models.checkpoints.problems import raise_problems
from sqjax.models.checkpoints.settings import Settings
from sqjax.models.config import DecoderConfig
from sqjax.models.fields import IDS, beyond, shown

#: Keys that would change what some model computes, with the values that change nothing. A family
#: that does not read one of them would ignore it, so there the key must have such a value.
NEUTRAL: Mapping[str, tuple] = {
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1),
    "rotary_pct": (None, 1),
    "rope_scaling": (None,),
    "layer_types": (None,),
    "sliding_window": (None,),
    "no_rope_layers": (None,),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "qkv_bias": (None, False),
    "use_qkv_bias": (None, False),
    "qk_layernorm": (None, False),
    "use_qk_norm": (None, False),
    "clip_qkv": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "alibi": (None, False),
    "use_bidirectional_attention": (None, False),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0, 1),
    "n_routed_experts": (None, 0),
}


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one family are read.

    Attributes:
        model_type: the key of config.json by which the family is known.
        fields: where each field of the configuration comes from: a value, or a function of the
            file's `Settings` such as `sqjax.models.checkpoints.settings.read` makes. Fields that
            are not named have their defaults, which are Llama's for a decoder.
        rows: which tensor fills which leaves; see `sqjax.models.checkpoints.names`.
        prefix: what may stand before a tensor's name; the rows do not have it.
        ignored: the ends of the names of tensors that say nothing, such as a stored mask.
        absent: what a key that is not in the file means, where that is not what `fields` say. A
            key that is there as null is not absent.
        neutral: other keys, each with its values that change nothing: any other is refused.
        usual_ends: the ids of tokens that end a text which transformers writes where nobody has
            said any, whatever the vocabulary's size: in a smaller one these say nothing.
        left_out: the starts of the names, with or without the prefix, of tensors of parts that the
            model here does not have, such as the head of a masked language model, or the other
            tower of two.
        optional: {a tensor's name without the prefix: {field: value}}, the fields that change where
            a checkpoint has no such tensor, of parts that no key tells of.
        config_type: the type of the configuration, which says what kind of model it is; one of
            `sqjax.models.checkpoints.kinds.KINDS`.
    """

    model_type: str
    fields: Mapping[str, Any]
    rows: tuple[Row, ...]
    prefix: str = "model."
    ignored: tuple[str, ...] = ()
    absent: Mapping[str, Any] = field(default_factory=dict)
    neutral: Mapping[str, tuple] = field(default_factory=dict)
    usual_ends: tuple[int, ...] = ()
    left_out: tuple[str, ...] = ()
    optional: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    config_type: type = DecoderConfig

    def __post_init__(self):
        if self.config_type not in KINDS:
            names = [kind.__name__ for kind in KINDS]
            raise ValueError(
                f"Family.config_type: expected one of {names}, got {shown(self.config_type)}"
            )
        known = {field.name for field in dataclasses.fields(self.config_type)}
        unknown = sorted(set(self.fields) - known)
        if unknown:
            raise ValueError(
                f"Family.fields: expected fields of {self.config_type.__name__}, {sorted(known)}, "
                f"got {unknown}"
            )

    def config(self, values: Mapping[str, Any], source: str) -> Config:
        """The configuration that a file's keys and values describe; `source` is for errors.

        Raises:
            ValueError: listing every key that is missing, that is not what it must be, or that
                asks for something that the model here does not do.
        """
        return self.translate(Settings({**self.absent, **values}), source)

    def translate(self, settings: Settings, source: str) -> Config:
        """As `config`, from settings of which problems may be known already."""
        found, keys, all_made = {}, {}, True
        for name, from_file in self.fields.items():
            value, first = from_file, len(settings.read_names)
            if callable(from_file):
                value, is_made = _made(settings, from_file)
                all_made = all_made and is_made
            found[name] = value
            keys[name] = settings.read_names[first:]
        # A field that was given up may have had more keys to read.
        neutral = {**NEUTRAL, **self.neutral} if all_made else {}
        settings.problems += _not_neutral(settings, neutral)
        ends = settings("eos_token_id", IDS, None)
        stated = set(jax.tree.leaves(ends)) - set(self.usual_ends)
        size = found.get("vocab_size") or 2**31
        settings.problems += beyond("eos_token_id", sorted(stated), size)
        # A wrong key is one problem, however many fields are made of it.
        raise_problems(source, list(dict.fromkeys(settings.problems)))
        try:
            return self.config_type(**found)
        except ValueError as error:
            field_name = str(error).partition(":")[0].rpartition(".")[2]
            of_file = _from(keys.get(field_name, ()))
            raise ValueError(f"{source}: {error}{of_file}") from error

    def find(self, name: str, leaves: Container[str]) -> Found | None:
        """Which of a model's leaves a tensor fills; None if the table has no row for it."""
        return find(self.rows, name.removeprefix(self.prefix), leaves)

    def fitted(self, config: Config, names: Iterable[str]) -> Config:
        """The configuration without the optional parts of which there is no tensor.

        Args:
            config: as `config` gives it.
            names: the names of all tensors of the checkpoint.
        """
        there = {name.removeprefix(self.prefix) for name in names}
        changes: dict[str, Any] = {}
        for name in self.optional.keys() - there:
            changes |= self.optional[name]
        return replace(config, **changes) if changes else config

    def ignores(self, name: str) -> bool:
        """Whether a tensor says nothing that the model here needs."""
        bare = name.removeprefix(self.prefix)
        starts = name.startswith(self.left_out) or bare.startswith(
            self.left_out
        )
        return starts or name.endswith(self.ignored)


def _made(settings: Settings, source: Any) -> tuple[Any, bool]:
    """(a field's value, whether there is one); where its keys are wrong, those are the problem."""
    known, first = len(settings.problems), len(settings.read_names)
    try:
        return source(settings), True
    except (ValueError, TypeError, ArithmeticError) as error:
        if len(settings.problems) == known:
            keys = settings.read_names[first:]
            settings.refuse(f"{error}{_from(keys)}")
        return None, False


def _from(keys: Iterable[str]) -> str:
    """Which keys of the file a field is made of, for the end of an error."""
    names = ", ".join(dict.fromkeys(keys))
    return f" (from {names})" if names else ""


def _not_neutral(
    settings: Settings, neutral: Mapping[str, Sequence]
) -> list[str]:
    """One problem for each key that nobody read though it changes the result."""
    problems = []
    for key, harmless in neutral.items():
        value = settings.values.get(key)
        if key in settings.seen or value in harmless:
            continue
        stated = map(repr, filter(lambda x: x is not None, harmless))
        expected = " or ".join(stated) or "no such key"
        name = settings.name(key)
        problems.append(
            f"{name} = {shown(value)}: expected {expected}; the model here computes nothing else"
        )
    return problems
