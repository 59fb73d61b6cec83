"""Hugging Face's Flax classes as plain functions of (params, *inputs), run as they are.

    fn, params = sqjax.models.from_flax(FlaxOPTForCausalLM.from_pretrained("facebook/opt-125m"))
    qparams = sqjax.smoothquant(fn, params, [ids])
    logits = jax.jit(sqjax.quantized(fn))(qparams, ids).logits

Some of these classes leave fields of their configuration unread, and would compute something else
than the checkpoint was trained for without a word. `ASSUMPTIONS` lists those fields, and
`from_flax` refuses such a model.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

PyTree = Any

#: Arguments of the classes' __call__ that no caller of fn gives: it sets return_dict, and leaves
#: those of training at what inference has.
_SET_BY_FN = ("train", "deterministic", "dropout_rng", "return_dict")


@dataclass(frozen=True)
class FlaxFunction:
    """One of Hugging Face's Flax models without its parameters: a pure function.

    `jax.jit`, `calibrate` and `quantized` take it as it is. Its outputs are the model's own; a
    cache is among them only if `past_key_values` came in. It runs for inference: no dropout.
    Equal and of equal hash only with itself, so that jit and `quantized` keep what they compiled.

    Attributes:
        model: the model, holding shapes in place of parameters, so that it keeps no memory alive.
        outputs: None, or the name or names of the outputs that are returned.
    """

    model: Any = field(repr=False)
    outputs: str | tuple[str, ...] | None = None

    def __call__(self, params: PyTree, *args: Any, **kwargs: Any) -> Any:
        """model(*args, params=params, **kwargs): the whole output, or those named in `outputs`.

        Raises:
            ValueError: an argument of training or return_dict is given, or the model has no
                output of that name.
        """
        for name in _SET_BY_FN:
            if name in kwargs:
                raise ValueError(
                    f"{name}: fn runs for inference and returns named outputs; "
                    "leave this argument out"
                )
        result = self.model(*args, params=params, return_dict=True, **kwargs)
        if self.outputs is None:
            return result
        if isinstance(self.outputs, str):
            self._check_outputs(result, [self.outputs])
            return result[self.outputs]
        self._check_outputs(result, self.outputs)
        return {name: result[name] for name in self.outputs}

    def _check_outputs(
        self, result: Mapping[str, Any], names: Sequence[str]
    ) -> None:
        """Raises ValueError if the model's output lacks one of these names."""
        missing = [name for name in names if result.get(name) is None]
        if missing:
            raise ValueError(
                f"{type(self.model).__name__}: outputs {missing}: expected some of {list(result)}"
            )

    def generate(self, params: PyTree, *args: Any, **kwargs: Any) -> Any:
        """model.generate(*args, params=params, **kwargs).

        Its loop is one `lax.while_loop`, so it can be jitted:

        jax.jit(sqjax.quantized(fn.generate), static_argnames="max_new_tokens")(qparams, ids,
        max_new_tokens=8)
        """
        settings = (
            kwargs.pop("generation_config", None)
            or self.model.generation_config
        )
        # The class writes into the settings that it is given, and the model keeps its own.
        settings = copy.deepcopy(settings)
        return self.model.generate(
            *args, params=params, generation_config=settings, **kwargs
        )


def from_flax(
    model: Any,
    params: PyTree = None,
    *,
    outputs: str | tuple[str, ...] | None = None,
) -> tuple[FlaxFunction, PyTree]:
    """A Hugging Face Flax model as (fn, params): fn(params, *inputs) runs its class unmodified.

    Args:
        model: a `FlaxPreTrainedModel`, such as FlaxOPTForCausalLM.from_pretrained(...).
        params: its parameters, if the model was made with _do_init=False and holds none.
        outputs: what fn returns: None for the model's whole output, a name such as "logits" for
            that array, several names for a dict. What is returned can not be scaled: a Whisper
            that returns `encoder_last_hidden_state` keeps the encoder's last norm from being
            folded, one that returns its logits does not.

    Returns:
        (fn, params), params a nested dict.

    Raises:
        ValueError: model is no `FlaxPreTrainedModel`, or has no parameters; its class ignores a
            field of its configuration (a `rope_theta`, tied embeddings, ...) and would compute
            something else than it says.

    Examples:
        >>> import jax, numpy as np, sqjax as sq
        >>> from transformers import FlaxOPTForCausalLM, OPTConfig
        >>> sizes = {"hidden_size": 8, "ffn_dim": 12, "num_attention_heads": 2}
        >>> lengths = {"num_hidden_layers": 1, "vocab_size": 31, "max_position_embeddings": 16}
        >>> model = FlaxOPTForCausalLM(OPTConfig(**sizes, **lengths), _do_init=False)
        >>> params = jax.jit(model.init_weights, static_argnums=1)(jax.random.key(0), (1, 1))
        >>> fn, params = sq.models.from_flax(model, params, outputs="logits")
        >>> fn(params, np.array([[1, 2, 3]])).shape
        (1, 3, 31)
    """
    name = type(model).__name__
    # By name, because transformers is not imported unless a user has imported it.
    bases = map(attrgetter("__name__"), type(model).__mro__)
    if "FlaxPreTrainedModel" not in bases:
        raise ValueError(
            "from_flax: expected one of Hugging Face's Flax models (FlaxOPTForCausalLM, ...), got "
            f"{name}; transformers 5 has no Flax classes any more: pip install 'sqjax[hf]' "
            "installs the last version that has them (other functions of (params, *inputs) need no "
            "conversion)"
        )
    # Refused here, because later nothing would show that the outputs are another model's.
    problems = ignored_fields(model)
    if problems:
        raise ValueError(
            f"{name} would compute something else than its configuration says:\n"
            + "\n".join(problems)
        )
    initialized = model._is_initialized
    if params is None and not initialized:
        raise ValueError(
            f"{name}: holds no parameters (_do_init=False); pass them: from_flax(model, params)"
        )
    if params is None:
        params = model.params
    # A shallow copy: the caller's own model keeps its parameters.
    bare = copy.copy(model)
    if initialized:
        # Shapes can not be computed with, so a use of other parameters than those passed in fails.
        bare.params = model.params_shape_tree
    return FlaxFunction(bare, outputs), _plain(params)


def _plain(tree: PyTree) -> PyTree:
    """Nested dicts in place of other mappings (FrozenDict)."""
    if not hasattr(tree, "items"):
        return tree
    return {key: _plain(value) for key, value in tree.items()}


class Assumption(NamedTuple):
    """What a class takes for granted about a field of its configuration.

    Attributes:
        classes: a pattern that the class's name starts with.
        field: the configuration's field; one that is absent passes.
        holds: (value, config) -> whether what the class computes is what the configuration says.
        computes: what the class does whatever the field says.
        fix: what to do instead.
    """

    classes: str
    field: str
    holds: Callable[[Any, Any], bool]
    computes: str
    fix: str


def ignored_fields(model: Any) -> list[str]:
    """One line for each field of the model's configuration that its class does not honour."""
    name, config = type(model).__name__, model.config
    lines = []
    for assumption in ASSUMPTIONS:
        key = assumption.field
        if not re.match(assumption.classes, name) or not hasattr(config, key):
            continue
        value = getattr(config, key)
        if not assumption.holds(value, config):
            problem = f"{name} {assumption.computes}; {assumption.fix}"
            lines.append(f"  config.{key} = {value!r}: {problem}")
    return lines


# What a class may take for granted: the `holds` of the table below.


def _is(*expected: Any) -> Callable[[Any, Any], bool]:
    """That the value is one of those expected."""
    return lambda value, config: value in expected


def _splits_hidden_size(value: Any, config: Any) -> bool:
    return (
        value is None
        or value * config.num_attention_heads == config.hidden_size
    )


def _is_hidden_size(value: Any, config: Any) -> bool:
    return value in (None, config.hidden_size)


def _window_is_never_reached(value: Any, config: Any) -> bool:
    return value is not None and value >= config.max_position_embeddings


# What to do instead: the `fix` of the table.
_LOAD = (
    "read the checkpoint with sqjax.models.load(directory), which honours it or says that it can "
    "not"
)
_OWN = "write the model as a function of (params, *inputs) that honours it: sqjax takes any"
# Names of classes that share their assumptions.
_ROTARY = "Flax(Llama|Mistral)"
_ABSOLUTE = "Flax(Bert|Roberta|RobertaPreLayerNorm|XLMRoberta|Electra|Albert)"

#: Read from the classes of transformers 4.57. Fields that only training reads (dropout, layerdrop,
#: initializers) and fields that change rounding alone (reorder_and_upcast_attn, slow_but_exact,
#: pretraining_tp) are not among them.
ASSUMPTIONS = (
    # Llama and Mistral.
    Assumption(
        _ROTARY,
        "rope_theta",
        _is(None, 10000),
        "rotates with base 10000",
        _LOAD,
    ),
    Assumption(
        _ROTARY,
        "rope_scaling",
        _is(None),
        "does not scale its rotary angles",
        _LOAD,
    ),
    Assumption(
        _ROTARY,
        "partial_rotary_factor",
        _is(None, 1),
        "rotates whole heads",
        _OWN,
    ),
    Assumption(
        _ROTARY + "ForCausalLM",
        "tie_word_embeddings",
        _is(False),
        "has an lm_head of its own",
        _LOAD,
    ),
    Assumption(
        _ROTARY,
        "head_dim",
        _splits_hidden_size,
        "has heads of hidden_size / num_attention_heads",
        _LOAD,
    ),
    Assumption(
        _ROTARY, "mlp_bias", _is(None, False), "has no biases in its MLP", _LOAD
    ),
    # Mistral alone.
    Assumption(
        "FlaxMistral",
        "attention_bias",
        _is(None, False),
        "has no biases in its attention",
        _LOAD,
    ),
    Assumption(
        "FlaxMistral",
        "sliding_window",
        _window_is_never_reached,
        "masks one token too few when a window is set, and all tokens but the last when none is",
        "set max_position_embeddings and sliding_window to the longest sequence that is used, if "
        "the window is no shorter, else " + _LOAD,
    ),
    # Gemma, whose checkpoints `load` does not read.
    Assumption(
        "FlaxGemma",
        "rope_theta",
        _is(None, 10000),
        "rotates with base 10000",
        _OWN,
    ),
    Assumption(
        "FlaxGemma",
        "rope_scaling",
        _is(None),
        "does not scale its rotary angles",
        _OWN,
    ),
    # Decoders with learned positions.
    Assumption(
        "FlaxGPT2",
        "scale_attn_weights",
        _is(True),
        "divides by the square root of head_dim",
        _OWN,
    ),
    Assumption(
        "FlaxGPT2",
        "scale_attn_by_inverse_layer_idx",
        _is(False),
        "divides by no layer's number",
        _OWN,
    ),
    Assumption("FlaxOPT", "enable_bias", _is(True), "has biases", _OWN),
    Assumption(
        "FlaxOPT",
        "layer_norm_elementwise_affine",
        _is(True),
        "has norms with gains and biases",
        _OWN,
    ),
    # Translation, encoders, images and speech: one field each.
    Assumption(
        "FlaxMarian",
        "share_encoder_decoder_embeddings",
        _is(True),
        "has one embedding for both sides",
        _OWN,
    ),
    Assumption(
        "FlaxRoFormer",
        "embedding_size",
        _is_hidden_size,
        "has embeddings of hidden_size",
        _OWN,
    ),
    Assumption(
        "FlaxResNet",
        "downsample_in_bottleneck",
        _is(False),
        "strides in its second convolution",
        _OWN,
    ),
    Assumption(
        "FlaxWav2Vec2",
        "adapter_attn_dim",
        _is(None),
        "has no adapters in its attention",
        _OWN,
    ),
    Assumption(
        _ABSOLUTE,
        "position_embedding_type",
        _is(None, "absolute"),
        "has absolute positions",
        _OWN,
    ),
)
