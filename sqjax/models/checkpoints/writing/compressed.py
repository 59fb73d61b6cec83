"""Quantized leaves as the modules of compressed-tensors; what they are is in
`sqjax.models.checkpoints.quantized.compressed_tensors`."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from sqjax.files.tensors import NewTensor
from sqjax.models.checkpoints.huggingface import Checkpoint
from sqjax.models.checkpoints.names import Found, Row, Shape
from sqjax.models.checkpoints.quantized.stored_weight import inputs_first
from sqjax.models.checkpoints.quantized.unpacking import pack, per_word
from sqjax.models.checkpoints.writing.leaves import Leaf, raise_all
from sqjax.models.config import DecoderConfig
from sqjax.models.stacking import layer_of
from sqjax.numerics.formats import E4M3, INT4, INT8
from sqjax.weights.qtensor import QTensor
from sqjax.weights.quant_weight import QuantWeight

_HEAD = "lm_head/kernel"
#: What `QuantWeight` calls the kinds of activations: (strategy, whether it is dynamic).
_STRATEGIES = {
    "per_token": ("token", True),
    "per_tensor": ("tensor", True),
    "static": ("tensor", False),
}
#: How our kernels, (in, out), are stored: (out, in).
_ORDER = (-1, -2)


class Modules(NamedTuple):
    """The quantized modules of a checkpoint.

    Attributes:
        of: the names of the float tensors in whose place they are.
        tensors: theirs.
        schemes: {module: its group in config.json, without targets}.
        floats: the modules whose kernels stay float.
    """

    of: frozenset[str]
    tensors: dict[str, NewTensor]
    schemes: dict[str, dict[str, Any]]
    floats: list[str]


def compressed_tensors(
    checkpoint: Checkpoint, leaves: Mapping[str, Leaf]
) -> Modules:
    """The modules whose leaves are quantized.

    Raises:
        ValueError: listing the leaves that are quantized in a way for which the format has no name,
            and the tensors of which some leaves are quantized and others are not; or none is.
    """
    tensors: dict[str, NewTensor] = {}
    schemes, floats, problems, names = {}, [], [], []
    for name in checkpoint.source.shapes:
        found = checkpoint.family.find(name, leaves)
        if found is None:
            continue
        own = [leaves[path] for path in found.paths]
        module = name.removesuffix(".weight")
        if not any(leaf.quantized for leaf in own):
            floats += _float_module(module, found)
            continue
        try:
            made = _module(checkpoint, name, found, own)
        except ValueError as error:
            problems.append(str(error))
            continue
        names.append(name)
        schemes[module] = made.scheme
        tensors |= {f"{module}.{end}": x for end, x in made.tensors.items()}
    if not names and not problems:
        problems = [
            "expected parameters that sqjax.quantize gave, got float ones; write these with "
            "sqjax.models.save_huggingface"
        ]
    raise_all(problems)
    return Modules(frozenset(names), tensors, schemes, floats)


def _float_module(module: str, found: Found) -> list[str]:
    """The module of a kernel that stays float; a norm or a bias is none that could be quantized."""
    return [module] if found.paths[0].endswith("/kernel") else []


def quantization_config(
    checkpoint: Checkpoint, modules: Modules
) -> dict[str, Any]:
    """The ``quantization_config`` of config.json."""
    groups: dict[str, dict[str, Any]] = {}
    for module, scheme in modules.schemes.items():
        key = json.dumps(scheme)
        group = groups.setdefault(key, {"targets": [], **scheme})
        group["targets"].append(module)
    formats = {group["format"] for group in groups.values()}
    # One group is all Linear layers but those under "ignore"; several are told apart by names.
    if len(groups) == 1:
        (only,) = groups.values()
        only["targets"] = ["Linear"]
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": group for i, group in enumerate(groups.values())
        },
        "ignore": _ignored(checkpoint, modules),
        "kv_cache_scheme": None,
    }


def _ignored(checkpoint: Checkpoint, modules: Modules) -> list[str]:
    """The modules that stay float: matrices without codes, and a tied head."""
    names = list(modules.floats)
    for name, tensor in checkpoint.others.items():
        if name.endswith(".weight") and len(tensor.entry.shape) == 2:
            names.append(name.removesuffix(".weight"))
    # It is a module of its own even where no file has a tensor for it.
    config = checkpoint.config
    if isinstance(config, DecoderConfig) and config.tie_embeddings:
        names += filter(None, map(_head_module, checkpoint.family.rows))
    return sorted(set(names) - modules.schemes.keys())


def _head_module(row: Row) -> str | None:
    return row.theirs.removesuffix(".weight") if row.ours == (_HEAD,) else None


# One module ---------------------------------------------------------------------------------------


class _Module(NamedTuple):
    """One module: its group in config.json, without targets; its tensors, by ends of names."""

    scheme: dict[str, Any]
    tensors: dict[str, NewTensor]


class _Part(NamedTuple):
    """One quantized leaf of a module: its path for errors, and what reads it, (in, out)."""

    path: str
    leaf: Leaf
    entry: int | None

    def read(self) -> QuantWeight:
        """The weight; of a stack of experts that of one."""
        weight = self.leaf.read()
        return weight if self.entry is None else layer_of(weight, self.entry)


def _module(
    checkpoint: Checkpoint, name: str, found: Found, leaves: Sequence[Leaf]
) -> _Module:
    """The module of one tensor.

    Raises:
        ValueError: a leaf can not be written; names it.
    """
    is_linear = name.endswith(".weight") and not inputs_first(found.layout)
    if not is_linear:
        path = leaves[0].origin
        raise ValueError(
            f"{path}: expected a kernel that the checkpoint has as a Linear layer, outputs first; "
            "got an embedding (a tied head?) or GPT-2's Conv1D, for which compressed-tensors "
            f"has no name; leave it float: sqjax.quantize(params, stats, {{{path!r}: None, '.*': "
            "scheme})"
        )
    parts = []
    for path, leaf in zip(found.paths, leaves, strict=True):
        if not leaf.quantized:
            raise ValueError(
                f"{path}: expected a quantized leaf, because the checkpoint has one tensor for it "
                f"and {', '.join(set(found.paths) - {path})}; quantize all of them alike, or none"
            )
        parts.append(_Part(leaf.origin, leaf, found.entry))
    weights = [part.read() for part in parts]
    for part, weight in zip(parts, weights, strict=True):
        _check(part.path, weight)
    _check_alike(parts, weights)
    join = partial(_joined, checkpoint.config, found, parts)
    sharing = _Sharing(_scales_differ(weights), _block(weights[0], join))
    scheme = _scheme(weights[0], sharing)
    tensors = _tensors(scheme["format"], weights, join, sharing)
    return _Module(scheme, tensors)


def _check(path: str, weight: QuantWeight) -> None:
    """Raises ValueError for a weight for which the format has no name."""
    tensor = weight.tensor
    inputs = tensor.values.shape[-1]
    in_groups = tensor.scale.shape[-1] > 1
    refused = {
        "no smoothing at run time; smooth the float parameters with sqjax.smooth": (
            weight.smoothing is not None
        ),
        "no rotation at run time; quantize it with rotation=None": (
            weight.rotation is not None
        ),
        "no outlier channels; quantize it with sqjax.W8A8": (
            weight.outliers is not None
        ),
        "one level of scales; use Int4(group_size=...) without two_level": (
            tensor.group_scale is not None
        ),
        "int8, int4 or e4m3 weights; use Float8(format='e4m3')": (
            tensor.fmt not in (INT8, INT4, E4M3)
        ),
        "activations without zero points; use PerToken()": (
            weight.activations == "per_token_zero_point"
        ),
        "int8 or e4m3 activations; use PerToken() or PerToken(format='e4m3')": (
            weight.activation_format not in ("int8", "e4m3")
        ),
        f"groups that divide its {inputs} inputs; choose another group_size": (
            in_groups and inputs % (tensor.group or inputs) != 0
        ),
        "a kernel (in, out), stored outputs first": (
            tensor.values.ndim != 2 or tensor.order != _ORDER
        ),
    }
    for expected, is_wrong in refused.items():
        if is_wrong:
            raise ValueError(
                f"{path}: expected {expected}, got {weight!r}; compressed-tensors has no other"
            )


def _check_alike(
    parts: Sequence[_Part], weights: Sequence[QuantWeight]
) -> None:
    """Raises ValueError unless leaves that are one tensor are quantized alike."""
    first = weights[0]
    for part, weight in zip(parts, weights, strict=True):
        same_kind = _kind(weight) == _kind(first)
        same_input = np.array_equal(_input(weight), _input(first))
        if not (same_kind and same_input):
            raise ValueError(
                f"{part.path}: expected to be quantized as {parts[0].path} is, because the "
                f"checkpoint has one tensor for both, got {weight!r} beside {first!r}; give both "
                "one rule"
            )


def _input(weight: QuantWeight) -> np.ndarray:
    """The scale of static activations; 0 where there is none."""
    scale = weight.input_scale
    return np.asarray(0.0 if scale is None else scale, np.float32)


def _kind(weight: QuantWeight) -> tuple:
    tensor = weight.tensor
    return (
        *(tensor.fmt, tensor.group, tensor.zero is None),
        *(weight.activations, weight.activation_format),
        tensor.scale.shape[0] == 1,
    )


def _scales_differ(weights: Sequence[QuantWeight]) -> bool:
    """Whether leaves that are one tensor have one scale each, and other ones."""
    scales = [np.asarray(weight.tensor.scale) for weight in weights]
    alone = all(scale.size == 1 for scale in scales)
    return alone and any(scale != scales[0] for scale in scales)


class _Sharing(NamedTuple):
    """What shares a scale beside what the leaves say.

    Attributes:
        by_output: whether leaves with one scale each, other ones, are one tensor.
        block: the outputs, and the inputs, of a block whose scales are alike; None for no blocks.
    """

    by_output: bool
    block: int | None


def _block(weight: QuantWeight, join: Any) -> int | None:
    """The size of the blocks of a float8 weight in groups, if its outputs' scales are alike there.

    Scales of 300 outputs in groups of 128 are those of blocks if they are those of the outputs 0,
    128 and 256, repeated. Others are scales of groups.
    """
    size = weight.tensor.group
    in_groups = weight.tensor.scale.shape[1] > 1
    if size is None or not in_groups or weight.tensor.fmt != E4M3:
        return None
    scale = join("scale")
    blocks = np.repeat(scale[::size], size, axis=0)[: len(scale)]
    return size if np.array_equal(blocks, scale) else None


def _scheme(weight: QuantWeight, sharing: _Sharing) -> dict[str, Any]:
    """How the module is quantized, in the words of config.json."""
    tensor = weight.tensor
    kind = "float" if tensor.fmt == E4M3 else "int"
    weights = {
        "num_bits": 4 if tensor.fmt == INT4 else 8,
        "type": kind,
        "group_size": None,
        "symmetric": tensor.zero is None,
        "dynamic": False,
        **_strategy(tensor, sharing),
    }
    activations = _activations(weight, kind)
    # Weights alone are packed, even of 8 bits, as the format's own tools do.
    packed = kind == "int" and (activations is None or tensor.fmt == INT4)
    return {
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": "pack-quantized" if packed else f"{kind}-quantized",
    }


def _strategy(tensor: QTensor, sharing: _Sharing) -> dict[str, Any]:
    """What shares a scale."""
    size = sharing.block
    if size is not None:
        return {"strategy": "block", "block_structure": [size, size]}
    if tensor.scale.shape[1] > 1:
        return {"strategy": "group", "group_size": tensor.group}
    is_one = tensor.scale.size == 1 and not sharing.by_output
    return {"strategy": "tensor" if is_one else "channel"}


def _activations(weight: QuantWeight, kind: str) -> dict[str, Any] | None:
    if weight.activations is None:
        return None
    strategy, dynamic = _STRATEGIES[weight.activations]
    return {
        "num_bits": 8,
        "type": kind,
        "strategy": strategy,
        "symmetric": True,
        "dynamic": dynamic,
    }


# Its tensors --------------------------------------------------------------------------------------


def _tensors(
    format_: str,
    weights: Sequence[QuantWeight],
    join: Any,
    sharing: _Sharing,
) -> dict[str, NewTensor]:
    """The module's tensors, by the ends of their names; `join(field)` reads one."""
    first = weights[0].tensor
    outputs = sum(weight.tensor.values.shape[0] for weight in weights)
    inputs = first.values.shape[1]
    bits = 4 if first.fmt == INT4 else 8
    one_scale = first.scale.size == 1 and not sharing.by_output
    rows = sharing.block or 1
    scales: Shape = -(-outputs // rows), first.scale.shape[1]
    if one_scale:
        scales = (1,)
    read = partial(_scale, join, scales, rows)
    made = {"weight_scale": NewTensor(np.dtype(np.float32), scales, read)}
    a_word = per_word(bits)
    if format_ == "pack-quantized":
        shape = np.array([outputs, inputs], np.int64)
        made["weight_shape"] = NewTensor(shape.dtype, (2,), lambda: shape)
        packed = outputs, -(-inputs // a_word)
        made["weight_packed"] = NewTensor(
            np.dtype(np.int32), packed, lambda: pack(join("values"), bits)
        )
    else:
        made["weight"] = NewTensor(
            first.fmt.dtype, (outputs, inputs), partial(join, "values")
        )
    if first.zero is not None:
        packed = -(-outputs // a_word), scales[-1]
        made["weight_zero_point"] = NewTensor(
            np.dtype(np.int32), packed, lambda: pack(join("zero").T, bits).T
        )
    # One for the module, which `_check_alike` has compared.
    scale = weights[0].input_scale
    if scale is not None:
        static = np.asarray(scale, np.float32).reshape(1)
        made["input_scale"] = NewTensor(static.dtype, (1,), lambda: static)
    return made


def _scale(join: Any, shape: Shape, rows: int) -> np.ndarray:
    """The scales, of which so many outputs have the same."""
    scale = join("scale")
    return scale.reshape(-1)[:1] if shape == (1,) else scale[::rows]


def _joined(
    config: Any, found: Found, parts: Sequence[_Part], field: str
) -> np.ndarray:
    """The codes, scales or zero points of a module, outputs first.

    Layouts move outputs and leave inputs where they are, so they serve scales too, whose groups
    stand where the inputs are. One scale for all outputs of a leaf is repeated for each of them.
    """
    arrays = []
    for part in parts:
        weight = part.read()
        array = np.asarray(attrgetter(field)(weight.tensor))
        # On a GPU they are of jnp.int4, which numpy can not take bits of.
        if weight.tensor.fmt == INT4 and field == "values":
            array = array.astype(np.int8)
        rows = weight.tensor.values.shape[0]
        arrays.append(np.broadcast_to(array, (rows, array.shape[1])).T)
    return np.ascontiguousarray(found.layout.join(config, arrays))
