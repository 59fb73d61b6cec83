"""`export`: a decoder's two programs, written by `jax.export`, with the weights beside them."""

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from sqjax._arguments import check_mapping, expect
from sqjax._trees import named_leaves
from sqjax.files.arrays import DeclaredArray, as_stored, check_savable
from sqjax.files.aside import directory_written_aside
from sqjax.files.header import read_header
from sqjax.files.opening import check_path, open_file
from sqjax.files.saving import told
from sqjax.files.tensors import NewTensor, write_tensors
from sqjax.models.cache import KVCache
from sqjax.models.checkpoints.writing.directory import check_target
from sqjax.models.checkpoints.writing.leaves import check_leaves
from sqjax.models.checkpoints.writing.llamas import tokenizer_files
from sqjax.models.checkpoints.writing.run_script import RUN
from sqjax.models.fields import SIZE, check
from sqjax.models.model import (
    Model,
    Params,
    cache_for,
    check_model,
    compute_dtype,
)
from sqjax.models.slots import CacheFormat, cache_format
from sqjax.models.stacking import unstack_layers
from sqjax.numerics.formats import INT4
from sqjax.runtime.quantized import quantized
from sqjax.weights.quant_weight import is_quantized
from sqjax.weights.quantize import named

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_MANIFEST, _WEIGHTS = "manifest.json", "weights.safetensors"
_PREFILL, _DECODE = "prefill.bin", "decode.bin"


def export(
    directory: str | os.PathLike[str],
    model: Model,
    params: Params,
    *,
    batch: int = 1,
    prompt: int = 128,
    length: int = 256,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    cache: str | CacheFormat = "float",
    overwrite: bool = False,
) -> None:
    """Writes a decoder as two programs that jax alone runs, with the weights beside them.

    jax writes and reads such programs with the package flatbuffers.

    ``prefill.bin`` reads the prompts, ``decode.bin`` one more token of each row; both are what
    `jax.export` writes. ``weights.safetensors`` has the arrays, quantized ones as they are, and
    ``manifest.json`` says in which order the programs take them. ``run.py``, 20 lines that import
    jax and numpy, shows how all of it is used:

        prefill(weights, ids (batch, prompt))         -> logits (batch, vocab), cache
        decode(weights, token (batch, 1), cache)      -> logits (batch, vocab), cache

    where weights and cache are lists of arrays, ids are int32, and logits are float32. A shorter
    prompt begins with -1, which is no token. int4 codes are two to a byte in the file. The programs
    take them as this process holds them: as int8 on a CPU, as int4 on a GPU or a TPU.

    Args:
        directory: to write. It must not be there, or be empty, unless `overwrite`.
        model: as `sqjax.models.load` gave it.
        params: its parameters, float or quantized in any scheme; layers may be one stack.
        batch: how many rows the programs read at once.
        prompt: the tokens of the longest prompt. Where all activations share one scale
            ("per_tensor"), that of a shorter prompt counts its padding too.
        length: the slots of the cache, for a padded prompt and all new tokens.
        platforms: what the programs run on: some of "cpu", "cuda", "rocm", "tpu".
        cache: how keys and values are stored, as in `generate`.
        overwrite: whether an export that is there is replaced, as a whole.

    Raises:
        ValueError: sizes that the model has no room for, an unknown platform, leaves that are
            missing, too many or misshapen, or a directory that may not be written.
        ImportError: the package flatbuffers, with which `jax.export` writes, is not installed.
        OSError: the files can not be written. What was there stays.

    Examples:
        >>> import json, pathlib, tempfile, jax, sqjax as sq
        >>> model = sq.models.Model(sq.models.llama_config(32, 8, 16, 1, 2, 1, 4))
        >>> params = model.init(jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     new = pathlib.Path(folder) / "new"
        ...     sq.models.export(new, model, params, prompt=4, length=8, platforms=("cpu",))
        ...     manifest = json.loads((new / "manifest.json").read_text())
        >>> manifest["weights"][0]["name"], manifest["new_tokens"]
        ('lm_head/kernel', 4)
    """
    check_model(model, "export")
    check_mapping(params, "export", "the parameters of a model")
    check_path(directory, "export(directory, ...)")
    target = Path(directory)
    sizes = _Sizes(batch, prompt, length)
    _check_package()
    with named("export"):
        sizes.check(model)
        _check_platforms(platforms)
        check_target(target, None, overwrite, known_by=_MANIFEST)
        check_leaves(model.config, params)
        weights = _weights(unstack_layers(params))
        programs = _programs(model, weights, sizes, cache_format(cache))
        exported = {
            file: jax_export.export(program, platforms=tuple(platforms))(*types)
            for file, (program, types) in programs.items()
        }
    try:
        _write(target, model, weights, sizes, exported)
    except OSError as error:
        raise told(error, f"export: {target}") from error


def _check_package() -> None:
    """Raises ImportError unless the package is there with which `jax.export` writes."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError(
            "export: jax.export writes with the package flatbuffers, which is not installed: pip "
            "install 'sqjax[export]'"
        )


class _Sizes(NamedTuple):
    """The sizes that the programs are made for, as `export` takes them."""

    batch: int
    prompt: int
    length: int

    def check(self, model: Model) -> None:
        """Raises ValueError unless a model has room for them."""
        for name, size in self._asdict().items():
            check(name, size, SIZE)
        most = model.config.max_length
        if not self.prompt < self.length <= most:
            raise ValueError(
                f"length: expected more than prompt = {self.prompt} and at most {most} "
                f"(config.max_length), got {self.length}"
            )
        change = model.config.keys_change_after
        if change is not None and self.length > change:
            raise ValueError(
                f"length: expected at most {change}, after which this model's keys change "
                f"(LongRope), got {self.length}"
            )


def _check_platforms(platforms: Any) -> None:
    is_list = isinstance(platforms, Sequence) and bool(platforms)
    fits = is_list and all(map(_PLATFORMS.__contains__, platforms))
    expect(fits, "platforms", f"some of {_PLATFORMS}", str(platforms))


# The weights --------------------------------------------------------------------------------------


class _Weights(NamedTuple):
    """The arrays of a parameter tree in the order in which the programs take them.

    Attributes:
        names: their paths.
        arrays: they themselves.
        treedef: makes the tree of them again.
        packed: the names of those that hold int4 codes, of which the file holds two in a byte.
        dtype: in which the model computes.
    """

    names: tuple[str, ...]
    arrays: list[Any]
    treedef: Any
    packed: frozenset[str]
    dtype: Any


def _weights(params: Params) -> _Weights:
    names, arrays, treedef = named_leaves(params)
    for name, x in zip(names, arrays, strict=True):
        check_savable(name, x)
    packed = set()
    paths, leaves, _ = named_leaves(params, is_leaf=is_quantized)
    for path, leaf in zip(paths, leaves, strict=True):
        if is_quantized(leaf) and leaf.tensor.fmt == INT4:
            # Only whole bytes, because the script then needs no length of rows.
            whole = leaf.tensor.values.shape[-1] % 2 == 0
            packed |= {f"{path}/tensor/values"} if whole else set()
    dtype = compute_dtype(params)
    return _Weights(names, arrays, treedef, frozenset(packed), dtype)


def _stored(x: Any, is_packed: bool) -> NewTensor:
    """An array as the file holds it."""
    dtype = np.dtype(x.dtype)
    if is_packed:
        declared = DeclaredArray(INT4.dtype, tuple(x.shape)).stored
        return NewTensor(*declared, read=lambda: as_stored(_in_int4(x)))
    if dtype == INT4.dtype:
        # safetensors has no int4, and codes of an odd row are not packed.
        dtype = np.dtype(np.int8)
    return NewTensor(dtype, tuple(x.shape), lambda: np.asarray(x).astype(dtype))


def _in_int4(x: Any) -> np.ndarray:
    return np.asarray(x).astype(INT4.dtype)


# The programs -------------------------------------------------------------------------------------


def _programs(
    model: Model, weights: _Weights, sizes: _Sizes, kind: CacheFormat
) -> dict[str, tuple[Any, tuple]]:
    """{file: (the program, the types of its arguments)}.

    Trees are lists of arrays, because a reader without sqjax knows none of its classes.
    """
    batch, prompt, length = sizes
    # Of float parameters it is `decode` itself.
    run = quantized(model.decode)
    empty = partial(
        cache_for, model.config, batch, length, weights.dtype, kind, prompt
    )
    types, cache_tree = jax.tree.flatten(jax.eval_shape(empty))
    cache_of = partial(jax.tree.unflatten, cache_tree)
    params_of = partial(jax.tree.unflatten, weights.treedef)

    def read(arrays: list, ids: jax.Array, cache: KVCache) -> tuple:
        logits, grown = run(params_of(arrays), ids, cache)
        return logits.astype(jnp.float32), jax.tree.leaves(grown)

    def prefill(arrays: list, ids: jax.Array) -> tuple:
        # Padding stands on the left, so that all rows write to one slot.
        padding = jnp.sum(ids < 0, axis=1, dtype=jnp.int32)
        cache = empty()._replace(padding=padding)
        return read(arrays, jnp.maximum(ids, 0), cache)

    def decode(arrays: list, token: jax.Array, cache: list) -> tuple:
        return read(arrays, token, cache_of(cache))

    of_weights = [_argument(x) for x in weights.arrays]
    ids, token = _ids(batch, prompt), _ids(batch, 1)
    return {
        _PREFILL: (jax.jit(prefill), (of_weights, ids)),
        _DECODE: (jax.jit(decode), (of_weights, token, types)),
    }


def _argument(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _ids(batch: int, tokens: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, tokens), jnp.int32)


# The files ----------------------------------------------------------------------------------------


def _write(
    directory: Path,
    model: Model,
    weights: _Weights,
    sizes: _Sizes,
    exported: Mapping[str, jax_export.Exported],
) -> None:
    tensors = {}
    for name, x in zip(weights.names, weights.arrays, strict=True):
        tensors[name] = _stored(x, name in weights.packed)
    with directory_written_aside(directory.resolve()) as new:
        # First, because the manifest says where in it each array begins.
        write_tensors(
            new / _WEIGHTS, tensors, {"format": "sqjax.models.export"}
        )
        entries = _entries(new / _WEIGHTS, weights, tensors)
        manifest = _manifest(model, sizes, entries, exported)
        text = json.dumps(manifest, indent=1) + "\n"
        (new / _MANIFEST).write_text(text, "utf-8")
        for file, program in exported.items():
            (new / file).write_bytes(program.serialize())
        (new / "run.py").write_text(RUN, "utf-8")
        files = tokenizer_files(model.tokenizer, model.config.max_length)
        for name, content in files.items():
            (new / name).write_text(content, "utf-8")


def _entries(
    file: Path, weights: _Weights, tensors: Mapping[str, NewTensor]
) -> list[dict[str, Any]]:
    """What the manifest says of each weight: the argument, and what stands in the file for it."""
    with open_file(file) as opened:
        offsets = read_header(opened).tensors
    entries = []
    for name, x in zip(weights.names, weights.arrays, strict=True):
        entries.append(
            {
                "name": name,
                **_type(x),
                "packed": name in weights.packed,
                "stored": tensors[name].dtype.name,
                "stored_shape": list(tensors[name].shape),
                "offset": offsets[name].first,
            }
        )
    return entries


def _type(x: Any) -> dict[str, Any]:
    """A type in JSON: {"dtype": "int8", "shape": [16, 8]}."""
    return {"dtype": np.dtype(x.dtype).name, "shape": list(x.shape)}


def _manifest(
    model: Model,
    sizes: _Sizes,
    entries: list[dict[str, Any]],
    exported: Mapping[str, jax_export.Exported],
) -> dict[str, Any]:
    """What a reader of the programs must know."""
    decode = exported[_DECODE]
    ends = () if model.tokenizer is None else model.tokenizer.ends
    token, *cache = decode.in_avals[len(entries) :]
    return {
        "format": "sqjax.models.export",
        "version": 1,
        "jax": jax.__version__,
        "calling_convention": decode.calling_convention_version,
        "platforms": list(decode.platforms),
        **sizes._asdict(),
        "new_tokens": sizes.length - sizes.prompt,
        "stop": list(ends),
        "programs": {
            _PREFILL: {
                "arguments": ["weights", "ids"],
                "results": ["logits", "cache"],
            },
            _DECODE: {
                "arguments": ["weights", "token", "cache"],
                "results": ["logits", "cache"],
            },
        },
        "ids": _type(_ids(sizes.batch, sizes.prompt)),
        "token": _type(token),
        "logits": _type(decode.out_avals[0]),
        "cache": [_type(x) for x in cache],
        "weights": entries,
    }
