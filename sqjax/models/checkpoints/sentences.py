"""What the files of the `sentence-transformers` package say: how a text becomes one vector."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sqjax.models.checkpoints.settings import Settings
from sqjax.models.fields import FLAG, SIZE, TEXT, one_of
from sqjax.models.json_files import read_list, read_object, read_object_if_there
from sqjax.models.pooling import POOLINGS, Pooling
from sqjax.models.text.batches import Reading

#: The keys of a Pooling's config.json, in the order in which its vectors stand.
_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
}
_MODULES = ("Transformer", "Pooling", "Normalize")


class Sentences(NamedTuple):
    """What the files say.

    Attributes:
        directory: of the model itself.
        pooling: how its states become one vector.
        reading: how texts are read.
    """

    directory: Path
    pooling: Pooling
    reading: Reading


def read_sentences(directory: Path) -> Sentences:
    """Reads ``modules.json`` and what it names.

    Without that file the directory is a plain model's: then the mean is taken, and not normalized.

    Raises:
        ValueError: the files ask for modules or a pooling that are not known here; names the file.
    """
    path = directory / "modules.json"
    if not path.exists():
        return Sentences(directory, Pooling(), _reading(directory, directory))
    folders = _modules(path)
    model = directory / folders["Transformer"]
    pooling = Pooling(
        _modes(directory / folders["Pooling"] / "config.json"),
        normalize="Normalize" in folders,
    )
    reading = _reading(directory, model)
    return Sentences(model, pooling, reading)


def _modules(path: Path) -> dict[str, str]:
    """{a module's kind: its folder}, of modules.json."""
    found: list[tuple[str, str]] = []
    for module in read_list(path):
        says = module if isinstance(module, Mapping) else {}
        kind, folder = says.get("type"), says.get("path")
        # "sentence_transformers.models.Pooling", in whatever package that is.
        name = str(kind).rpartition(".")[2]
        if name not in _MODULES:
            raise ValueError(
                f"{path}: expected modules of {_MODULES}, got {kind!r}; take encoder.apply and "
                "what follows it in code of your own"
            )
        # A path with folders in it could lead out of the directory.
        if not _is_folder(folder):
            raise ValueError(
                f"{path}: path: expected the name of a folder beside it, got {folder!r}"
            )
        found.append((name, str(folder)))
    order = tuple(name for name, _ in found)
    if order not in (_MODULES, _MODULES[:2]):
        raise ValueError(
            f"{path}: expected the modules {_MODULES}, of which the last may be missing, in this "
            f"order, got {order}"
        )
    return dict(found)


def _is_folder(name: Any) -> bool:
    """Whether this is the name of a folder, or "" for the directory itself."""
    return isinstance(name, str) and Path(name).name == name and name != ".."


def _modes(path: Path) -> tuple[str, ...]:
    """The poolings of a Pooling's config.json."""
    settings = Settings(read_object(path))
    newer = settings("pooling_mode", one_of(*POOLINGS, None), None)
    modes = [] if newer is None else [newer]
    for key, mode in _MODES.items():
        # sentence-transformers takes the mean unless a file says that it is not wanted.
        usual = mode == "mean" and newer is None
        if settings(key, FLAG, usual):
            modes.append(mode)
    for key in sorted(set(settings.values) - set(_MODES)):
        if key.startswith("pooling_mode_") and settings.values[key]:
            settings.refuse(
                f"{key} = {settings.values[key]!r}: not supported; expected some of {list(_MODES)}"
            )
    if not settings("include_prompt", FLAG, True):
        settings.refuse(
            "include_prompt = False: not supported; expected true, because here the tokens of a "
            "prompt are pooled like others"
        )
    if not modes:
        settings.refuse(f"expected one of {list(_MODES)} to be true, got none")
    _check(path, settings)
    return tuple(dict.fromkeys(modes))


#: What the file is called that says how a Transformer reads; the first that there is counts.
_OF_TRANSFORMER = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "xlm-roberta")
)


def _reading(directory: Path, model: Path) -> Reading:
    """How texts are read."""
    there = [name for name in _OF_TRANSFORMER if (model / name).exists()]
    path = model / [*there, _OF_TRANSFORMER[0]][0]
    settings = Settings(read_object_if_there(path))
    longest = settings("max_seq_length", SIZE, None)
    lowercase = settings("do_lower_case", FLAG, False)
    _check(path, settings)
    says = read_object_if_there(model / "tokenizer_config.json")
    if says.get("truncation_side", "right") != "right":
        raise ValueError(
            f"{model / 'tokenizer_config.json'}: truncation_side: expected 'right', got "
            f"{says['truncation_side']!r}; here long texts lose their ends"
        )
    if longest is None:
        longest = _model_max_length(says)
    return Reading(longest, lowercase, _usual_prompt(directory))


def _model_max_length(says: Mapping[str, Any]) -> int | None:
    """How long a text a tokenizer's file allows; None where it does not say."""
    stated = says.get("model_max_length")
    # transformers writes 1e30 for a tokenizer without a limit.
    return stated if SIZE.holds(stated) else None


def _usual_prompt(directory: Path) -> str:
    """What is put before every text, if the caller says nothing."""
    path = directory / "config_sentence_transformers.json"
    settings = Settings(read_object_if_there(path))
    name = settings("default_prompt_name", TEXT, None)
    prompt = ""
    if name is not None:
        prompt = settings.within("prompts")(name, TEXT)
    _check(path, settings)
    return prompt


def _check(path: Path, settings: Settings) -> None:
    """Raises ValueError if anything that was read of a file is not what it must be."""
    if settings.problems:
        listed = "; ".join(settings.problems)
        raise ValueError(f"{path}: {listed}")
