"""The directory of a checkpoint: shards and their index, config.json, and all other files."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sqjax.files.aside import directory_written_aside
from sqjax.files.shards import INDEX
from sqjax.files.tensors import NewTensor, in_shards, write_tensors
from sqjax.models.json_files import read_list

#: Ends of the names of files that hold weights, which would contradict what is written.
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack"),
    *(".h5", ".onnx", ".ot", ".pkl", ".npz", ".index.json", INDEX),
)
_CONFIG = "config.json"
#: What says how the files beside it were made. It is no part of a model, and true of no other one.
_RECIPE = "recipe.yaml"


def check_target(
    directory: Path,
    source: Path | None,
    overwrite: bool,
    known_by: str = _CONFIG,
) -> None:
    """Raises ValueError unless a directory may be written, and so replaced if it is there.

    `known_by` is a file that what is written here has, so that nothing else is replaced.
    """
    here = directory.resolve()
    origin = [] if source is None else [source.resolve()]
    holds_source = here in (path for x in origin for path in (x, *x.parents))
    _require(
        not holds_source,
        f"{directory}: expected a directory that does not hold like = {source}, which would be "
        "replaced; choose another",
    )
    _require(
        directory.parent.is_dir(),
        f"{directory}: expected a path in a directory that exists; make {directory.parent} first",
    )
    _require(
        directory.is_dir() or not directory.exists(),
        f"{directory}: expected a directory or a path that is free, got a file",
    )
    # An empty directory is free too: many make one first.
    inside = sorted(directory.iterdir()) if directory.is_dir() else []
    _require(
        overwrite or not inside,
        f"{directory}: expected a path that is free, got a directory with files in it; pass "
        "overwrite=True to replace it",
    )
    if inside:
        _check_replaced(directory, known_by)


def _check_replaced(directory: Path, known_by: str) -> None:
    """Raises ValueError unless a directory looks like what is written here.

    All that it holds will be removed.
    """
    what = "a checkpoint" if known_by == _CONFIG else "an export"
    words = f"expected to replace {what}, with {known_by} and no folders, got"
    expected = f"{directory}: {words} "
    remedy = "; choose another path"
    is_one = (directory / known_by).is_file()
    _require(is_one, f"{expected}one without it{remedy}")
    strange = strange_folders(directory)
    _require(not strange, f"{expected}one that holds {strange[:3]}{remedy}")


def strange_folders(directory: Path) -> list[str]:
    """The names of folders in a directory that are no part of a model."""
    known = _folders(directory)
    inside = filter(Path.is_dir, sorted(directory.iterdir()))
    return [path.name for path in inside if path not in known]


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


class Others(NamedTuple):
    """What is in a directory beside the tensors.

    Attributes:
        config: the text of config.json.
        files: {name, perhaps in a folder: text, or the path of a file that is copied}.
    """

    config: str
    files: Mapping[str, str | Path]

    def with_keys(self, changes: Mapping[str, Any]) -> "Others":
        """The same with other values of keys of config.json, whose text stays if they are so."""
        stated = json.loads(self.config)
        # The text itself, because so a checkpoint that did not change has the source's bytes.
        if all(stated.get(key) == value for key, value in changes.items()):
            return self
        text = json.dumps({**stated, **changes}, indent=2) + "\n"
        return self._replace(config=text)


def others_of(source: Path) -> Others:
    """What a checkpoint's directory holds beside the weights: tokenizer, templates, a licence."""
    files: dict[str, str | Path] = {}
    for folder in (source, *_folders(source)):
        for path in sorted(folder.iterdir()):
            # Those weights would be others than what is written, and a reader might take them.
            holds_weights = path.name.endswith(_WEIGHTS)
            is_left = path.name.startswith(".") or path.name == _RECIPE
            if path.is_file() and not holds_weights and not is_left:
                files[path.relative_to(source).as_posix()] = path
    del files[_CONFIG]
    return Others((source / _CONFIG).read_text("utf-8"), files)


def _folders(directory: Path) -> list[Path]:
    """The folders in a directory that belong to its model: those of `sentence-transformers`."""
    file = directory / "modules.json"
    if not file.is_file():
        return []
    modules = [x for x in read_list(file) if isinstance(x, Mapping)]
    names = {module.get("path") for module in modules}
    inside = filter(Path.is_dir, sorted(directory.iterdir()))
    return [path for path in inside if path.name in names]


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, NewTensor],
    others: Others,
    max_shard_bytes: int,
) -> None:
    """Writes a directory, which replaces as a whole at the end what is there.

    Args:
        directory: to write.
        tensors: by name.
        others: all other files.
        max_shard_bytes: how large a file of tensors may be; a tensor is never divided.
    """
    with directory_written_aside(directory.resolve()) as new:
        write_files(new, others)
        _write_shards(new, tensors, max_shard_bytes)


def write_files(new: Path, others: Others) -> None:
    """Writes config.json and all other files to a new directory."""
    (new / _CONFIG).write_text(others.config, "utf-8")
    for name, content in others.files.items():
        (new / name).parent.mkdir(exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, new / name)
        else:
            (new / name).write_text(content, "utf-8")


def _write_shards(
    new: Path, tensors: Mapping[str, NewTensor], max_shard_bytes: int
) -> None:
    """Writes model.safetensors, or shards with model.safetensors.index.json."""
    shards = in_shards(tensors, max_shard_bytes)
    metadata = {"format": "pt"}
    if len(shards) == 1:
        write_tensors(new / "model.safetensors", tensors, metadata)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_tensors(new / file, shard, metadata)
        weight_map |= dict.fromkeys(shard, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (new / "model.safetensors.index.json").write_text(text)


def dtype_key(
    others: Others,
    tensors: Mapping[str, NewTensor],
    floats: tuple[np.dtype, ...],
) -> dict[str, str]:
    """The key of config.json that says the dtype, which is that of most floats."""
    # Newer files say "dtype"; where both are there the newer one counts.
    keys = json.loads(others.config).keys()
    key = "dtype" if "dtype" in keys else "torch_dtype"
    held: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in floats:
            held[tensor.dtype.name] += tensor.nbytes
    most = held.most_common(1)
    return {key: most[0][0]} if most else {}
