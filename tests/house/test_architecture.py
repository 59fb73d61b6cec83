"""The house rules: rooms and their imports, public names with examples that run, nothing heavy loads unasked."""

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import pytest

import sqjax

ROOT = Path(sqjax.__file__).parent
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))

#: {room: the rooms that it may import}. Every room may import the small helpers, `sqjax._*`.
MAY_IMPORT = {
    "numerics": set(),
    "program": set(),
    "weights": {"numerics"},
    "files": {"weights", "numerics"},
    "folding": {"program"},
    "calibration": {"folding", "program", "numerics"},
    "proving": {"folding", "program", "numerics"},
    "runtime": {"program", "weights", "numerics"},
    "methods": {"calibration", "folding", "weights", "runtime", "program", "numerics"},
    "choosing": {"methods", "calibration", "folding", "weights", "runtime", "program", "numerics"},
    "layers": {"weights", "runtime", "program", "numerics"},
    "models": {"weights", "runtime", "layers", "numerics", "files"},
    "streaming": {"models", "methods", "calibration", "folding", "weights"},
}
MAY_IMPORT["report"] = {"calibration", "folding", "methods", "models", "program", "weights"}
MAY_IMPORT["commands"] = set(MAY_IMPORT)
#: Files beside the rooms that only hand public names on; `import sqjax` itself reads no command and no model.
FACES = {"__init__": set(MAY_IMPORT) - {"commands", "models"}, "__main__": {"commands"}}
FACES |= {"linen": {"layers"}, "nnx": {"layers"}, "plots": {"report"}}


def room_of(path):
    return path.parts[0].removesuffix(".py")


@cache
def parsed(path):
    return ast.parse((ROOT / path).read_text())


@cache
def imports(path):
    """[(what is imported, as sqjax.room.module.name, line)] of ours, wherever the import stands."""
    found = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return [(name, line) for name, line in found if name.split(".")[0] == "sqjax"]


def test_every_room_is_in_the_table():
    rooms = {path.parts[0] for path in FILES if len(path.parts) > 1}
    files = {room_of(path) for path in FILES if len(path.parts) == 1}
    assert rooms == set(MAY_IMPORT)
    assert {name for name in files if not re.match("_[a-z]", name)} == set(FACES)


def forbidden(path):
    """[(what is imported, line)] of what the room of a file may not import."""
    room = room_of(path)
    allowed = {room, "__version__", *{**MAY_IMPORT, **FACES}.get(room, set())}
    if room == "commands":
        allowed |= {*sqjax.__all__}  # the commands are users of the library too
    found = []
    for name, line in imports(path):
        imported = name.split(".")[1]
        is_helper = re.match("_[a-z]", imported)
        if not is_helper and imported not in allowed:
            found.append((name, line))
    return found


def test_a_room_imports_only_what_it_may():
    wrong = {str(path): forbidden(path) for path in FILES}
    assert {path: found for path, found in wrong.items() if found} == {}


def test_no_private_name_crosses_a_file():
    private = [
        f"{path}:{line} imports {name}"
        for path in FILES
        for name, line in imports(path)
        if any(part.startswith("_") for part in name.split(".")[2:])
    ]
    assert private == []


def test_no_circles_inside_a_room():
    known = {_module(path) for path in FILES}
    modules = {
        _module(path): {_imported(name, known) for name, _ in imports(path)} for path in FILES
    }
    done = set()
    while rest := {m: needs for m, needs in modules.items() if m not in done}:
        free = {m for m, needs in rest.items() if not needs - done - {m} & set(rest)}
        assert free, f"these import each other: {sorted(rest)}"
        done |= free


def _module(path):
    return ".".join(("sqjax", *path.with_suffix("").parts)).removesuffix(".__init__")


def _imported(name, known):
    """The module of an imported name, which may be a module itself."""
    return name if name in known else name.rpartition(".")[0]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_the_docstring_of_a_room_says_what_it_may_import(room):
    docstring = importlib.import_module(f"sqjax.{room}").__doc__
    sentence = re.search(r"May import (.*)", docstring, re.S).group(1)
    named = set(re.findall(r"`(\w+)`", sentence.split("never")[0]))
    assert named == (set() if room == "commands" else MAY_IMPORT[room])


def test_dir_shows_the_public_names_alone():
    namespaces = {"linen", "models", "mosaic", "nnx", "plots", "report", "triton"}
    assert set(dir(sqjax)) == {*sqjax.__all__, *namespaces, "__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", sqjax.__version__)


def test_files_name_no_machine():
    place = re.compile(r"/(?:tmp|work|home|root|Users|mnt|data)/\S*")
    found = {str(path): place.findall((ROOT / path).read_text()) for path in FILES}
    assert {path: places for path, places in found.items() if places} == {}


HEAVY = (
    "flax",
    "transformers",
    "torch",
    "matplotlib",
    "tensorflow",
    "gguf",
    "tokenizers",
    "safetensors",
    "optax",
)


def loaded_by(statement):
    code = f"import sys; {statement}; print([m for m in {HEAVY} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True
    )
    return set(ast.literal_eval(run.stdout))


def test_importing_sqjax_loads_no_jax_until_a_name_is_used():
    code = "import sys, sqjax; print([m for m in ('jax', 'numpy', 'flax') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_type_checkers_see_the_names_where_they_are():
    [block] = [node for node in parsed(Path("__init__.py")).body if isinstance(node, ast.If)]
    seen = {f"{node.module}.{a.name}" for node in block.body for a in node.names}
    assert {name.rpartition(".")[2] for name in seen} == set(sqjax.__all__)
    for name in seen:
        module, _, own = name.rpartition(".")
        assert getattr(sqjax, own) is getattr(importlib.import_module(module), own)


@pytest.mark.slow
def test_the_core_loads_nothing_heavy():
    names = ("calibrate", "smoothquant", "quantized", "save", "load", "verify", "QTensor", "W8A8")
    assert loaded_by(f"import sqjax; {'; '.join(f'sqjax.{name}' for name in names)}") == set()


@pytest.mark.slow
def test_only_linen_nnx_and_models_load_flax_and_when_they_are_used():
    assert loaded_by("import sqjax; sqjax.linen.QuantDense") >= {"flax"}
    assert loaded_by("import sqjax; sqjax.nnx.QuantLinear") >= {"flax"}
    assert not loaded_by("import sqjax; sqjax.models.LlamaConfig") & {
        "transformers",
        "torch",
        "matplotlib",
    }
    users = {
        path.parts[0]
        for path in FILES
        if re.search(r"^\s*(from|import) flax", (ROOT / path).read_text(), re.M)
    }
    # `_serialized` imports it in a function, once something else has loaded it.
    assert users == {"layers", "models", "streaming", "_serialized.py"}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'sqjax' has no attribute 'smoothe'"):
        _ = sqjax.smoothe


# Public names -----------------------------------------------------------------------------------------------------

#: Functions that load with the models, when they are first used.
LATE = {
    name: getattr(sqjax, name)
    for name in ("calibrate_layers", "load_quantized", "stats_from_act_scales")
}
PUBLIC = {
    name: value
    for name, value in ((name, getattr(sqjax, name)) for name in sqjax.__all__)
    if name not in LATE and not isinstance(value, sqjax.Scheme)
}
_linen = importlib.import_module("sqjax.linen")
_nnx = importlib.import_module("sqjax.nnx")
_LINEN = ("QuantDense", "QuantDenseGeneral", "quantize_dense", "quantize_dense_general")
FLAX = {f"linen.{name}": getattr(_linen, name) for name in _LINEN}
FLAX |= {f"nnx.{name}": getattr(_nnx, name) for name in ("functional", "rebuild", "QuantLinear")}


def test_the_public_names_are_these():
    presets = {name for name in sqjax.__all__ if isinstance(getattr(sqjax, name), sqjax.Scheme)}
    assert presets == {
        *(
            "W8A8",
            "W8A8_O1",
            "W8A8_O2",
            "W8A8_O3",
            "W8A8_O3_ROTATED",
            "W8A8_OUTLIERS",
            "W8A16",
            "W4A16",
            "W4A16_G64",
            "W4A8",
            "W4A4",
            "W4A4_ROTATED",
        ),
        *("FP8", "FP8_E5M2", "EMBEDDING_INT8", "EMBEDDING_INT4"),
    }
    assert set(PUBLIC) == {
        *(
            "calibrate",
            "scales",
            "rotate",
            "rotate_stats",
            "rotations",
            "fold",
            "fold_stats",
            "gram_bytes",
            "prepare_by_search",
            "quantize_by_search",
            "recommend",
            "smooth",
            "quantize",
            "quantized",
            "smoothquant",
            "verify",
            "with_kernel",
            "site_errors",
            "gptq",
            "choose_precision",
            "learn",
            "gptq_blocks",
            "prove",
        ),
        *("search_alpha", "awq", "smooth_awq"),
        *(
            "QTensor",
            "QuantWeight",
            "Scheme",
            "Int8",
            "Int4",
            "Float8",
            "PerToken",
            "PerTensor",
            "Static",
            "Indices",
            "Stats",
            "dequantize",
            "shardings",
            "split",
            "merge",
            "int8_attention",
            "quantize_cache",
            "save",
            "load",
            "load_saved",
        ),
    }


@pytest.mark.slow
@pytest.mark.each_case
@pytest.mark.parametrize("name", [*PUBLIC, *FLAX, *LATE])
def test_a_public_name_has_an_example_that_runs(name):
    value = {**PUBLIC, **FLAX, **LATE}[name]
    [test] = [t for t in doctest.DocTestFinder(recurse=False).find(value, name, globs={})]
    assert any(example.want for example in test.examples), (
        f"sqjax.{name} has no example that shows a result"
    )
    report = []
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize("name", [*PUBLIC, *FLAX, *LATE])
def test_a_docstring_names_every_argument_or_says_where(name):
    value = {**PUBLIC, **FLAX, **LATE}[name]
    if not inspect.isfunction(value):
        return
    arguments = [p for p in inspect.signature(value).parameters if p not in ("progress",)]
    elsewhere = "Arguments and errors are those of" in value.__doc__
    missing = [a for a in arguments if not re.search(rf"\b{a}\b", value.__doc__)]
    assert elsewhere or not missing


def without_docstring(path):
    """The module of a file and its public definitions that have no docstring."""
    nodes = [n for n in parsed(path).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    named = {n.name: n for n in nodes if not n.name.startswith("_")} | {"": parsed(path)}
    return [f"{path}: {name}" for name, node in named.items() if not ast.get_docstring(node)]


def test_every_module_and_public_definition_has_a_docstring():
    assert [missing for path in FILES for missing in without_docstring(path)] == []
