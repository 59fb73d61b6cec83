"""From a checkpoint's tensors to the parameter tree: names by a table, shapes checked first."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.typing import DTypeLike

from sqjax.models.llama import LlamaConfig
from sqjax.models.model import Params

Shape = tuple[int, ...]

#: How many problems an error lists.
_PROBLEMS_SHOWN = 30

# Hugging Face's tensor name -> path in the tree, and whether the matrix must be transposed: it is
# stored as (out, in), and Flax's kernels are (in, out).
PATHS_OF_HUGGINGFACE = [
    (r"model\.embed_tokens\.weight", r"model/embed_tokens/embedding", False),
    (
        r"model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+_proj)\.weight",
        r"model/layers/\1/\2/\3/kernel",
        True,
    ),
    (
        r"model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+_proj)\.bias",
        r"model/layers/\1/\2/\3/bias",
        False,
    ),
    (
        r"model\.layers\.(\d+)\.(\w+_layernorm)\.weight",
        r"model/layers/\1/\2/weight",
        False,
    ),
    (r"model\.norm\.weight", r"model/norm/weight", False),
    (r"lm_head\.weight", r"lm_head/kernel", True),
]


def translate(name: str) -> tuple[str, bool] | None:
    """The tree path of a tensor, and whether to transpose it; None for a name not in the table."""
    for pattern, path, transposed in PATHS_OF_HUGGINGFACE:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(path), transposed
    return None


def assemble(
    source: str,
    config: LlamaConfig,
    tensors: Mapping[str, tuple[str, Shape]],
    read: Callable[[str], np.ndarray],
    dtype: DTypeLike,
    problems: Iterable[str] = (),
) -> Params:
    """Builds the parameter tree of a model from named tensors.

    Args:
        source: where the tensors come from, for the error message.
        config: the model.
        tensors: the file's own name of each tensor -> its Hugging Face name and its shape.
        read: gives the array of a tensor, called with the file's own name.
        dtype: the dtype of every leaf.
        problems: what the caller already found wrong.

    Raises:
        ValueError: one error with every problem: tensors that are unknown, missing, doubled or
            misshapen.
    """
    matched, match_problems = _match(config, tensors)
    raise_problems(source, [*problems, *match_problems])
    leaves = {}
    for path, (own_name, transposed) in matched.items():
        array = read(own_name)
        _check_range(source, own_name, array, dtype)
        leaves[path] = jnp.asarray(
            array.T if transposed else array, dtype=dtype
        )
    return unflatten_dict(leaves, sep="/")


def _check_range(
    source: str, name: str, array: np.ndarray, dtype: DTypeLike
) -> None:
    """Raises ValueError if a number would become infinite in the dtype that is asked for."""
    bound = float(jnp.finfo(dtype).max)
    if float(jnp.finfo(array.dtype).max) <= bound:
        return
    largest = np.max(np.abs(array), where=np.isfinite(array), initial=0)
    if largest > bound:
        raise ValueError(
            f"{source}: {name}: expected numbers up to {bound:.3g}, the range of "
            f"{jnp.dtype(dtype).name}, got {largest:.3g}; load it in a wider dtype"
        )


def _match(
    config: LlamaConfig, tensors: Mapping[str, tuple[str, Shape]]
) -> tuple[dict[str, tuple[str, bool]], list[str]]:
    """({path in the tree: the tensor's own name, whether to transpose it}, problems).

    Nothing is read: the shapes in the file's header are compared with the model's.
    """
    layers = _layers_in(name for name, _ in tensors.values())
    matched: dict[str, tuple[str, bool]] = {}
    problems = []
    if config.num_layers > layers:
        problems.append(
            f"expected the tensors of {config.num_layers} layers, got those of {layers}"
        )
    # Of as many layers as there are, because any number may be declared.
    present = min(config.num_layers, layers)
    expected_leaves = parameter_shapes(config, present)
    for own_name, (name, shape) in tensors.items():
        path, transposed = translate(name) or ("", False)
        if path not in expected_leaves:
            problems.append(
                f"{own_name}: expected no such tensor, got one of shape {shape}"
            )
            continue
        if path in matched:
            other, _ = matched[path]
            problems.append(
                f"{own_name}: expected one tensor for {path}, got {other} too"
            )
            continue
        matched[path] = own_name, transposed
        expected = expected_leaves[path]
        if transposed:
            expected = expected[::-1]
        if shape != expected:
            problems.append(
                f"{own_name}: expected shape {expected}, got {shape}"
            )
    for path in sorted(expected_leaves.keys() - matched.keys()):
        problems.append(f"{path}: expected a tensor for it, got none")
    return matched, problems


def _layers_in(names: Iterable[str]) -> int:
    """How many layers the names of tensors speak of."""
    found = set()
    for name in names:
        match = re.match(r"model\.layers\.(\d+)\.", name)
        if match:
            found.add(match[1])
    return len(found)


def parameter_shapes(
    config: LlamaConfig, layers: int | None = None
) -> dict[str, Shape]:
    """{path: shape} of every parameter, of so many layers (None: of all).

    For a hidden size of 64 and two heads of 16, layers/0/self_attn/q_proj/kernel is (64, 32).
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    dense = [
        ("self_attn/q_proj", hidden, queries, config.attention_bias),
        ("self_attn/k_proj", hidden, keys, config.attention_bias),
        ("self_attn/v_proj", hidden, keys, config.attention_bias),
        ("self_attn/o_proj", queries, hidden, config.attention_bias),
        ("mlp/gate_proj", hidden, inner, config.mlp_bias),
        ("mlp/up_proj", hidden, inner, config.mlp_bias),
        ("mlp/down_proj", inner, hidden, config.mlp_bias),
    ]
    in_layer: dict[str, Shape] = {
        "input_layernorm/weight": (hidden,),
        "post_attention_layernorm/weight": (hidden,),
    }
    for name, rows, columns, has_bias in dense:
        in_layer[f"{name}/kernel"] = (rows, columns)
        if has_bias:
            in_layer[f"{name}/bias"] = (columns,)
    shapes: dict[str, Shape] = {
        "model/embed_tokens/embedding": (config.vocab_size, hidden),
        "model/norm/weight": (hidden,),
    }
    if not config.tie_embeddings:
        shapes["lm_head/kernel"] = (hidden, config.vocab_size)
    for number in range(config.num_layers if layers is None else layers):
        for name, shape in in_layer.items():
            shapes[f"model/layers/{number}/{name}"] = shape
    return shapes


def usual_heads(fields: Mapping[str, Any]) -> dict[str, int]:
    """The fields of heads that a configuration leaves open, as they usually are."""
    usual = {
        "num_kv_heads": fields["num_heads"],
        "head_dim": fields["hidden_size"] // fields["num_heads"],
    }
    return {name: n for name, n in usual.items() if fields[name] is None}


def raise_problems(source: str, problems: list[str]) -> None:
    """Raises one ValueError with all problems (the first of very many), if there are any."""
    if problems:
        lines = problems[:_PROBLEMS_SHOWN]
        if len(problems) > len(lines):
            lines = [*lines, f"and {len(problems) - len(lines)} more"]
        raise ValueError(
            f"{source} does not hold the model that its configuration describes; "
            f"{len(problems)} problem(s), so use a complete checkpoint of a supported model:\n  "
            + "\n  ".join(lines)
        )
