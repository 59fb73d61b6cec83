"""Exported programs: run by a script that knows nothing of sqjax, they give the tokens of `generate`."""

import ast
import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from tiny_llama import GROUPED, Letters, random_params
from tokenizers import Tokenizer as Backend
from tokenizers import models

import sqjax as sq
from sqjax.models import CacheFormat, Model, export, generate, stack_layers
from sqjax.models.tokenizer import Tokenizer

MODEL, ONE_LAYER = Model(GROUPED), Model(replace(GROUPED, num_layers=1))
INT8_DOT = re.compile(
    r"stablehlo\.dot_general .*: \(tensor<[\dx]+xi8>, tensor<[\dx]+xi8>\) -> tensor<[\dx]+xi32>"
)
W4 = sq.W4A16.replace(weight=sq.Int4(group_size=8, zero_point=True))
FORMS = {"float": None, "w4a16": W4, "w8a8": sq.W8A8}
CACHE = CacheFormat("int8", keys="plain")
SIZES = {"prompt": 6, "length": 14}
ROWS = [[7, 3, 40, 1], [5, 60, 2, 9, 33, 21]]


def params_in(form, model=ONE_LAYER):
    params = random_params(model)
    if FORMS[form] is None:
        return params
    ids = jnp.asarray([ROWS[1]])
    stats = sq.calibrate(model.apply, params, [ids])
    return sq.quantize(params, stats, {"embed_tokens": None, ".*": FORMS[form]})


def text(rows):
    return [",".join(map(str, row)) for row in rows]


def expected_tokens(params, rows, steps, model=ONE_LAYER, **how):
    return generate(model, params, rows, steps, **how).tokens


def printed(out):
    return [list(map(int, line.split())) for line in out.splitlines()]


def run_here(directory, capsys, monkeypatch, steps, rows):
    """run.py in this process."""
    monkeypatch.setattr(sys, "argv", ["run.py", str(steps), *text(rows)])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        runpy.run_path(str(directory / "run.py"))
    return printed(capsys.readouterr().out)


@pytest.mark.slow
def test_int4_codes_share_bytes_and_give_the_same_tokens(tmp_path, capsys, monkeypatch):
    """In groups with zero points, in a batch with padding, with an int8 cache, from a stack."""
    params = params_in("w4a16", MODEL)
    how = {**SIZES, "batch": 2, "platforms": ["cpu"], "cache": CACHE}
    export(tmp_path / "new", MODEL, stack_layers(params), **how)
    got = run_here(tmp_path / "new", capsys, monkeypatch, 8, ROWS)
    assert got == expected_tokens(params, ROWS, 8, MODEL, cache=CACHE)
    manifest = json.loads((tmp_path / "new/manifest.json").read_text())
    by_name = {w["name"]: w for w in manifest["weights"]}
    codes = by_name["model/layers/0/mlp/up_proj/kernel/tensor/values"]
    assert codes["shape"] == [32, 32]
    assert (codes["stored"], codes["stored_shape"]) == ("uint8", [32, 16])
    assert manifest["cache"][0] == {"dtype": "int8", "shape": [2, 2, 14, 8]}
    # More than there is room for is not asked of the cache.
    assert [len(row) for row in run_here(tmp_path / "new", capsys, monkeypatch, 99, ROWS)] == [8, 8]


@pytest.mark.slow
def test_int8_stays_int8_and_an_end_ends_a_row(tmp_path, capsys, monkeypatch):
    params = params_in("w8a8")
    tokens = expected_tokens(params, ROWS[1:], 8)[0]
    end = tokens[4]
    model = Model(ONE_LAYER.config, Letters(None, end))
    export(tmp_path / "new", model, params, **SIZES, platforms=["cpu"])
    program = jax.export.deserialize(bytearray((tmp_path / "new/decode.bin").read_bytes()))
    # Four of attention and three of the MLP; the tied head is float.
    assert len(INT8_DOT.findall(program.mlir_module())) == 7
    got = run_here(tmp_path / "new", capsys, monkeypatch, 8, ROWS[1:])
    assert got == [tokens[: tokens.index(end) + 1]]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_without_sqjax_and_for_three_platforms(tmp_path, form):
    params = params_in(form)
    export(tmp_path / "new", ONE_LAYER, params, **SIZES)
    blocked = "import runpy, sys; sys.modules['sqjax'] = None; sys.argv.pop(0); runpy.run_path(sys.argv[0])"
    command = [sys.executable, "-I", "-c", blocked, str(tmp_path / "new/run.py"), "8"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, *text(ROWS[:1])],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=environment,
    )
    assert printed(done.stdout) == expected_tokens(params, ROWS[:1], 8)
    for name in ("prefill.bin", "decode.bin"):
        program = jax.export.deserialize(bytearray((tmp_path / "new" / name).read_bytes()))
        assert program.platforms == ("cpu", "cuda", "tpu")


def test_the_script_is_short_and_imports_jax_alone():
    from sqjax.models.checkpoints.writing.run_script import RUN

    assert len(RUN.splitlines()) <= 20
    imported = set()
    for node in ast.walk(ast.parse(RUN)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        assert not isinstance(node, ast.ImportFrom)
    assert imported <= {"json", "pathlib", "re", "sys", "jax", "numpy"}


@pytest.mark.parametrize("arguments", ["", "4", "4 1,2,3 1", "x 1", "4 1,x", "4 1,2,3,4", "4 1,,2"])
def test_wrong_arguments_of_the_script_are_a_line(tmp_path, monkeypatch, arguments):
    from sqjax.models.checkpoints.writing.run_script import RUN

    (tmp_path / "run.py").write_text(RUN)
    (tmp_path / "manifest.json").write_text('{"prompt": 3, "batch": 1}')
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments.split()])
    usage = "usage: run.py NEW_TOKENS ID,ID,...: whole numbers, at most 3 ids in a prompt"
    with pytest.raises(SystemExit, match=f"^{usage}$"):
        runpy.run_path(str(tmp_path / "run.py"))


def test_without_flatbuffers_nothing_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"flatbuffers.* pip install 'sqjax\[export\]'"):
        export(tmp_path / "new", ONE_LAYER, params_in("float"), **SIZES)


def test_files_of_the_tokenizer_and_replacing(tmp_path):
    backend = Backend(models.WordLevel({f"t{i}": i for i in range(61)}, unk_token="t0"))
    model, params = Model(ONE_LAYER.config, Tokenizer(backend, 3)), params_in("float")
    how = {"prompt": 1, "length": 2, "platforms": ["cpu"]}
    export(tmp_path / "new", model, params, **how)
    assert json.loads((tmp_path / "new/tokenizer.json").read_text())["model"]["type"] == "WordLevel"
    assert json.loads((tmp_path / "new/manifest.json").read_text())["stop"] == [3]
    with pytest.raises(ValueError, match="overwrite=True to replace it"):
        export(tmp_path / "new", model, params, **how)
    export(tmp_path / "new", ONE_LAYER, params, **how, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "decode.bin",
        "manifest.json",
        "prefill.bin",
        "run.py",
        "weights.safetensors",
    ]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"an export, with manifest\.json and no folders"):
        export(tmp_path / "other", ONE_LAYER, params, **how, overwrite=True)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "export: batch: expected a whole number from 1"),
        ({"prompt": 14}, "length: expected more than prompt = 14 and at most 64"),
        ({"length": 65}, r"at most 64 \(config.max_length\), got 65"),
        ({"platforms": "cpu"}, r"platforms: expected some of \('cpu', .*got 'cpu'"),
        ({"platforms": ["gpu"]}, r"platforms: expected some of .*got \"\['gpu'\]\""),
        ({"cache": "int2"}, "cache: expected one of"),
    ],
)
def test_refusals(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "new", ONE_LAYER, params_in("float"), **{**SIZES, **change})
    assert not list(tmp_path.iterdir())


def test_parameters_of_another_model_are_named(tmp_path):
    params = params_in("float")
    params["lm_head"] = {"kernel": jnp.ones((3, 3))}
    with pytest.raises(ValueError, match=r"export: lm_head/kernel: expected .*\(3, 3\)"):
        export(tmp_path / "new", ONE_LAYER, params, **SIZES)
    del params["lm_head"], params["model"]["norm"]
    with pytest.raises(ValueError, match="export: model/norm/weight: expected "):
        export(tmp_path / "new", ONE_LAYER, params, **SIZES)
