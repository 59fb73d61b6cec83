"""The house rules: imports go down the floors, public names have examples that run, nothing heavy loads unasked."""

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import sqjax

ROOT = Path(sqjax.__file__).parent
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))

#: Lowest first; a file imports only from floors below its own (the files of `models` also from each other).
FLOORS = [
    ["formats", "printing", "trees", "views", "timing"],
    ["qtensor", "products", "ranges"],
    ["matmul"],
    ["triton", "equations", "exporting"],
    ["sharding"],
    ["interpreter", "labels"],
    ["flat"],
    ["program"],
    ["graph", "devices"],
    ["sites", "certificate", "closure"],
    ["stacks"],
    ["folding", "evaluation", "tables"],
    ["grouping"],
    ["observation", "statistics"],
    ["smoothing"],
    ["proof"],
    ["calibration"],
    ["schemes"],
    ["quantization"],
    ["bodies", "caches"],
    ["execution", "dense", "attention", "layout"],
    ["files"],
    ["verification"],
    ["functional"],
    ["linen", "nnx"],
    ["models"],
    ["demo"],
    ["comparison", "benchmark", "decoding"],
    ["cli"],
    ["__main__"],
    ["__init__"],
]
FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}


def imports(path):
    """{(module below sqjax, line)} that a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, node.lineno) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = [f"sqjax.{a.name}" for a in node.names] if node.module == "sqjax" else [node.module]
            found |= {(name, node.lineno) for name in names}
    return {(name.split(".")[1] if "." in name else "__init__", line) for name, line in found if _is_ours(name)}


def _is_ours(name):
    return name == "sqjax" or name.startswith("sqjax.")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_down_the_floors(path):
    floor = path.parts[0].removesuffix(".py")
    assert floor in FLOOR_OF, f"{path} is on no floor: give it one in FLOORS"
    for name, line in imports(path):
        below = FLOOR_OF[name] < FLOOR_OF[floor] or (name == floor == "models")
        assert below, f"{path}:{line} imports sqjax.{name}, which is not below it"


def test_every_floor_has_its_file():
    there = {path.parts[0].removesuffix(".py") for path in FILES}
    assert set(FLOOR_OF) == there


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_name_no_machine(path):
    found = re.findall(r"/(?:tmp|work|home|root|Users|mnt|data)/\S*", (ROOT / path).read_text())
    assert not found


HEAVY = ("flax", "transformers", "torch", "matplotlib", "tensorflow", "gguf", "tokenizers", "safetensors", "optax")


def loaded_by(statement):
    code = f"import sys; {statement}; print([m for m in {HEAVY} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True)
    return set(ast.literal_eval(run.stdout))


def test_importing_sqjax_loads_nothing_heavy():
    assert loaded_by("import sqjax") == set()


def test_only_linen_nnx_and_models_load_flax_and_when_they_are_used():
    assert loaded_by("import sqjax; sqjax.linen.QuantDense") >= {"flax"}
    assert loaded_by("import sqjax; sqjax.nnx.QuantLinear") >= {"flax"}
    assert not loaded_by("import sqjax; sqjax.models.LlamaConfig") & {"transformers", "torch", "matplotlib"}
    users = {path.parts[0] for path in FILES if re.search(r"^\s*(from|import) flax", (ROOT / path).read_text(), re.M)}
    assert users == {"functional.py", "linen.py", "nnx.py", "models"}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'sqjax' has no attribute 'smoothe'"):
        _ = sqjax.smoothe


# Public names -----------------------------------------------------------------------------------------------------

PUBLIC = {
    name: value
    for name, value in vars(sqjax).items()
    if not name.startswith("_") and not inspect.ismodule(value) and not isinstance(value, sqjax.Scheme)
    if getattr(value, "__module__", "").startswith("sqjax")
}
_linen = importlib.import_module("sqjax.linen")
_nnx = importlib.import_module("sqjax.nnx")
_LINEN = ("QuantDense", "QuantDenseGeneral", "quantize_dense", "quantize_dense_general")
FLAX = {f"linen.{name}": getattr(_linen, name) for name in _LINEN}
FLAX |= {f"nnx.{name}": getattr(_nnx, name) for name in ("functional", "rebuild", "QuantLinear")}


def test_the_public_names_are_these():
    presets = {name for name, value in vars(sqjax).items() if isinstance(value, sqjax.Scheme)}
    assert presets == {
        *("W8A8", "W8A8_O1", "W8A8_O2", "W8A8_O3", "W8A8_OUTLIERS", "W8A16", "W4A16", "W4A16_G64", "W4A8"),
        *("FP8", "FP8_E5M2", "EMBEDDING_INT8", "EMBEDDING_INT4"),
    }
    assert set(PUBLIC) == {
        *("calibrate", "scales", "fold", "fold_stats", "smooth", "quantize", "quantized", "smoothquant", "verify"),
        *(
            "QTensor",
            "QuantWeight",
            "Scheme",
            "Stats",
            "dequantize",
            "shardings",
            "int8_attention",
            "quantize_cache",
            "save",
            "load",
        ),
    }


@pytest.mark.parametrize("name", [*PUBLIC, *FLAX])
def test_a_public_name_has_an_example_that_runs(name):
    value = {**PUBLIC, **FLAX}[name]
    [test] = [t for t in doctest.DocTestFinder(recurse=False).find(value, name, globs={})]
    assert any(example.want for example in test.examples), f"sqjax.{name} has no example that shows a result"
    report = []
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize("name", [*PUBLIC, *FLAX])
def test_a_docstring_names_every_argument_or_says_where(name):
    value = {**PUBLIC, **FLAX}[name]
    if not inspect.isfunction(value):
        return
    arguments = [p for p in inspect.signature(value).parameters if p not in ("progress",)]
    elsewhere = "Arguments and errors are those of" in value.__doc__
    missing = [a for a in arguments if not re.search(rf"\b{a}\b", value.__doc__)]
    assert elsewhere or not missing


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_module_and_public_definition_has_a_docstring(path):
    tree = ast.parse((ROOT / path).read_text())
    assert ast.get_docstring(tree)
    definitions = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    assert not [n.name for n in definitions if not n.name.startswith("_") and not ast.get_docstring(n)]
