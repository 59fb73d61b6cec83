"""Checkpoints without a source: the files of a Llama, made of its configuration and tokenizer."""

import json
from typing import Any

from sqjax.models.checkpoints.families.common import ACTIVATIONS
from sqjax.models.checkpoints.families.llama import LLAMA, MISTRAL
from sqjax.models.checkpoints.family import Family
from sqjax.models.checkpoints.huggingface import Checkpoint, read_config
from sqjax.models.checkpoints.kinds import Config
from sqjax.models.checkpoints.mapping import Source, parameter_shapes
from sqjax.models.checkpoints.names import Shape, their_shape
from sqjax.models.checkpoints.writing.directory import Others
from sqjax.models.config import DecoderConfig
from sqjax.models.text.chat import DEFAULT
from sqjax.models.text.tokenizer import Tokenizer

_NEW = "a new checkpoint"
#: {a key of tokenizer_config.json: the field of `Tokenizer`}, and of config.json with "_id".
_SPECIAL = {"bos_token": "bos_id", "eos_token": "eos_id", "pad_token": "pad_id"}


def _values(config: Any) -> dict[str, Any]:
    """The config.json of a model that is a Llama, or a Mistral, which may have a window.

    Raises:
        ValueError: the model is another, of which such a file would say too little.
    """
    problem = (
        "like: expected the directory that the model was loaded from, because without one only a "
        "Llama can be written, and this is another model"
    )
    if not isinstance(config, DecoderConfig):
        raise ValueError(f"{problem}: {type(config).__name__}")
    values = _as_a_llama(config)
    try:
        _, read = read_config(values, _NEW)
    except ValueError as error:
        raise ValueError(f"{problem}: {error}") from error
    # All that such a file can not say shows in what is read of it.
    if read != config:
        raise ValueError(f"{problem}: {config}")
    return values


def _as_a_llama(config: DecoderConfig) -> dict[str, Any]:
    kind = config.kinds[0]
    theirs = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": LLAMA.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": theirs.get(config.activation),
        "rms_norm_eps": config.norm.eps,
        "rope_theta": kind.rope.theta if kind.rope else None,
        "rope_scaling": None,
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }
    if kind.sliding_window is not None:
        values |= {
            "architectures": ["MistralForCausalLM"],
            "model_type": MISTRAL.model_type,
            "sliding_window": kind.sliding_window,
        }
        # torch's Mistral has no biases, whatever these say.
        del values["attention_bias"], values["mlp_bias"]
    return values


def _ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The keys of special tokens."""
    if tokenizer is None:
        return {}
    ids = {
        f"{key}_id": getattr(tokenizer, field)
        for key, field in _SPECIAL.items()
    }
    # A list only where there are several, because older readers take a number alone.
    if len(tokenizer.ends) > 1:
        ids["eos_token_id"] = list(tokenizer.ends)
    return ids


def llama_checkpoint(config: Config) -> Checkpoint:
    """What an opened checkpoint of this model would be, but for its arrays."""
    window = config.kinds[0].sliding_window
    family = LLAMA if window is None else MISTRAL
    shapes = _tensor_shapes(config, family)
    source = Source(_NEW, shapes, _no_arrays)
    return Checkpoint(source, family, config, (), _nothing, {}, False)


def _no_arrays(name: str) -> Any:
    raise ValueError(f"{name}: {_NEW} has no arrays")


def _nothing() -> None:
    """There are no tensors that could say something else than the rest."""


def _tensor_shapes(config: DecoderConfig, family: Family) -> dict[str, Shape]:
    """{name: shape} of the tensors that a model of a family has, by the family's rows."""
    leaves = parameter_shapes(config, config.num_layers)
    shapes: dict[str, Shape] = {}
    for layer in map(str, range(config.num_layers)):
        for row in family.rows:
            # Rows of what stands around the layers have no number, and come again for each.
            paths = [path.format(layer=layer) for path in row.ours]
            if set(paths) <= leaves.keys():
                name = row.theirs.format(layer=layer)
                is_head = paths[0].startswith("lm_head/")
                prefix = "" if is_head else family.prefix
                own = tuple(leaves[path] for path in paths)
                shapes[prefix + name] = their_shape(config, row.layout, own)
    return shapes


def new_files(model: Any) -> Others:
    """The configuration, and the files that hold a tokenizer whole.

    Raises:
        ValueError: the model is no Llama.
    """
    values = _values(model.config)
    tokenizer = model.tokenizer
    config = json.dumps(values | _ids(tokenizer), indent=2) + "\n"
    return Others(config, tokenizer_files(tokenizer, model.config.max_length))


def tokenizer_files(
    tokenizer: Tokenizer | None, max_length: int
) -> dict[str, str]:
    """{name: text} of the files that hold a tokenizer whole; none for a model without one."""
    if tokenizer is None or tokenizer.backend is None:
        return {}
    settings = _tokenizer_settings(tokenizer, max_length)
    return {
        "tokenizer.json": tokenizer.backend.to_str(),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


def _tokenizer_settings(
    tokenizer: Tokenizer, max_length: int
) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": tokenizer.tidies,
    }
    for key, field in _SPECIAL.items():
        number = getattr(tokenizer, field)
        if number is not None:
            settings[key] = tokenizer.backend.id_to_token(number)
    template = tokenizer.templates.named.get(DEFAULT)
    if template is not None:
        settings["chat_template"] = template.text
    return settings
