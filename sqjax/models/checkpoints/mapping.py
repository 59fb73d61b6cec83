"""From a checkpoint's tensors to the parameter tree: names by a table, shapes checked first."""

import re
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from sqjax.models.llama import LlamaConfig
from sqjax.models.model import Model, Params

Shape = tuple[int, ...]

# Hugging Face's tensor name -> path in the tree, and whether the matrix must be transposed: it is
# stored as (out, in), and Flax's kernels are (in, out).
TABLE = [
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
    for pattern, path, transposed in TABLE:
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
        leaves[path] = jnp.asarray(
            array.T if transposed else array, dtype=dtype
        )
    return unflatten_dict(leaves, sep="/")


def _match(
    config: LlamaConfig, tensors: Mapping[str, tuple[str, Shape]]
) -> tuple[dict[str, tuple[str, bool]], list[str]]:
    """({path in the tree: the tensor's own name, whether to transpose it}, problems).

    Nothing is read: the shapes in the file's header are compared with the model's.
    """
    expected_leaves = flatten_dict(parameter_shapes(config), sep="/")
    matched: dict[str, tuple[str, bool]] = {}
    problems = []
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
        expected = expected_leaves[path].shape
        if transposed:
            expected = expected[::-1]
        if shape != expected:
            problems.append(
                f"{own_name}: expected shape {expected}, got {shape}"
            )
    for path in sorted(expected_leaves.keys() - matched.keys()):
        problems.append(f"{path}: expected a tensor for it, got none")
    return matched, problems


def parameter_shapes(config: LlamaConfig) -> Params:
    """The parameter tree with a `jax.ShapeDtypeStruct` in the place of every array."""
    return jax.eval_shape(Model(config).init, jax.random.key(0))


def raise_problems(source: str, problems: list[str]) -> None:
    """Raises one ValueError with all problems, if there are any."""
    if problems:
        raise ValueError(
            f"{source} does not hold the model that its configuration describes; "
            f"{len(problems)} problem(s), so use a complete checkpoint of a supported model:\n  "
            + "\n  ".join(problems)
        )
