"""The script for a visit to a GPU: what it takes from a record, what it makes, and a tiny run of all of it.

The tiny run is there so that a mistake does not cost a visit; its figures mean nothing.
"""

import json
import subprocess
import sys
import time
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sqjax as sq
from sqjax.commands import cli
from sqjax.commands.gpu import check, matmul, script, weights
from sqjax.commands.gpu import notes as record_of_visit
from sqjax.commands.gpu.llama import kind_of
from sqjax.commands.gpu.notes import Notes, Plan
from sqjax.commands.gpu.profile import Event, compiled, runs_of
from sqjax.commands.gpu.weights import SCHEMES, random_weight, some_outputs
from sqjax.commands.gpu.wholes import MODELS
from sqjax.commands.records import read_record
from sqjax.models import Model

# The record -------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path):
    command = ["python", "-m", "sqjax.commands.gpu"]
    return Plan(command, tmp_path / "record.json", True, time.monotonic(), 60.0)


def names(plan):
    return [row["name"] for row in read_record(plan.path).rows]


def test_a_part_goes_on_where_it_stopped_and_other_parts_stay(plan):
    first, other = Notes(plan, "check"), Notes(plan, "matmul")
    first.add("a", {"holds": True})
    first.failed("b", ValueError("no"))
    other = Notes(plan, "matmul")
    other.add("c", {"us": 1.234567})
    again = Notes(plan, "check")
    assert (again.has("a"), again.has("b")) == (True, False)
    again.add("b", {"holds": True})
    assert names(plan) == ["run", "c", "run", "a", "b"]
    assert not again.wrong
    assert read_record(plan.path).rows[1] == {"part": "matmul", "name": "c", "us": 1.2346}


def test_rows_of_other_code_are_measured_again(plan, monkeypatch):
    Notes(plan, "check").add("a", {"holds": True})
    monkeypatch.setattr(record_of_visit, "code", lambda: "another")
    assert not Notes(plan, "check").has("a")


def test_a_record_of_another_card_is_refused(plan, monkeypatch):
    Notes(plan, "check").add("a", {"holds": True})
    monkeypatch.setattr(record_of_visit, "card", lambda: "NVIDIA H100")
    with pytest.raises(
        ValueError, match=r"record\.json: it is of a cpu, and this is a NVIDIA H100"
    ):
        Notes(plan, "matmul")


def test_kernels_that_part_check_found_wrong_are_not_measured(plan, monkeypatch):
    """Nor those that never ended there: they would end the process that measures."""
    monkeypatch.setattr(weights, "has_mosaic", lambda: True)
    assert weights.measures_mosaic(Notes(plan, "matmul"))
    check = Notes(plan, "check")
    check.add(weights.KERNELS, {"error": "begun, and not ended"})
    found = Notes(plan, "matmul")
    assert not weights.measures_mosaic(found)
    found.write()
    assert read_record(plan.path).rows[-1]["left_out"] == [
        "Mosaic kernels: not right in part check"
    ]
    check.add(weights.KERNELS, {"holds": True})
    assert weights.measures_mosaic(Notes(plan, "matmul"))
    check.add(weights.KERNELS, {"holds": False})
    # Of other code it is not known.
    monkeypatch.setattr(record_of_visit, "code", lambda: "another")
    assert weights.measures_mosaic(Notes(plan, "matmul"))


def test_a_kernel_that_never_ends_has_said_so_before(plan, monkeypatch):
    def ends_the_process(shapes):
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "has_mosaic", lambda: True)
    monkeypatch.setattr(check, "kernels", ends_the_process)
    with pytest.raises(KeyboardInterrupt):
        check._kernels(Notes(plan, "check"), ())
    [row] = read_record(plan.path).rows[1:]
    assert row["error"] == "begun, and not ended"


@pytest.mark.parametrize("figures", [{"holds": False}, {"error": "ValueError: no"}])
def test_what_is_wrong_is_named(plan, figures):
    notes = Notes(plan, "check")
    notes.add("a", figures)
    assert notes.wrong == ["a"]


# Weights ----------------------------------------------------------------------------------------------------------


def test_random_weights_are_what_the_library_reads_and_keep_the_variance():
    shape = 256, 128
    x = jax.random.normal(jax.random.key(1), (64, shape[0]), jnp.bfloat16)
    weights = {name: random_weight(jax.random.key(0), shape, how) for name, how in SCHEMES.items()}
    run = jax.jit(lambda ws: {n: sq.quantized(lambda p, x: x @ p)(w, x) for n, w in ws.items()})
    floats = jax.jit(
        lambda ws: {n: sq.dequantize(w.tensor).astype(jnp.float32) for n, w in ws.items()}
    )(weights)
    for name, out in run(weights).items():
        assert 0.8 < float(jnp.std(out.astype(jnp.float32))) < 1.2, name
        read = some_outputs(weights[name].tensor, 24)
        # A bfloat16 has 8 digits.
        np.testing.assert_allclose(read, floats[name][:, :24].T, rtol=2**-8, err_msg=name)


def test_the_tiny_models_are_models():
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    for config in MODELS.values():
        model = Model(config)
        params = jax.eval_shape(model.init, jax.random.key(0))
        assert jax.eval_shape(model.apply, params, ids).shape == (1, 4, config.vocab_size)


# Profiles ---------------------------------------------------------------------------------------------------------


def test_runs_are_told_apart_by_pauses():
    """A pause counts from the end of whatever ended last."""
    starts = [0.0, 10.0, 16_000.0, 40_000.0, 40_010.0]
    lengths = [15_000.0, 5.0, 1.0, 1.0, 1.0]
    events = [Event(*pair, "k") for pair in zip(starts, lengths, strict=True)]
    assert [len(run) for run in runs_of(events)] == [3, 2]


def test_a_program_that_fails_is_noted_and_the_others_run(plan):
    def refuse(x):
        raise ValueError("no")

    jobs = {"a": (jax.jit(refuse), (1.0,)), "b": (jax.jit(lambda x: x + 1), (1.0,))}
    notes = Notes(plan, "matmul")
    assert set(compiled(jobs, notes)) == {"b"}
    assert notes.wrong == ["a"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NNN", "matmul"),
        ("sm90_xmma_gemm_i8i32_i8i32_i32_tn_n_tilesize128x128x128", "matmul"),
        ("gemm_fusion_dot_general_1", "matmul"),
        ("loop_transpose_fusion", "transpose"),
        ("input_reduce_fusion_21", "reduce"),
        ("wrapped_convert", "elementwise"),
        ("Memset 3", "copy"),
    ],
)
def test_kernels_of_the_h200_are_known_by_their_names(name, kind):
    assert kind_of(name) == kind


# What costs the others nothing ------------------------------------------------------------------------------------


@pytest.fixture
def matmuls(plan, monkeypatch):
    """Part "matmul" with nothing to measure but what a test puts in its place; returns what was asked for."""
    plan = plan._replace(tiny=False, path=None)
    monkeypatch.setattr(matmul, "_beside_torch", lambda *_: None)
    monkeypatch.setattr(matmul, "measures_mosaic", lambda _: True)
    return Notes(plan, "matmul")


def test_a_card_that_can_not_be_measured_and_a_product_that_fails(matmuls, monkeypatch):
    def no_card(*_):
        raise RuntimeError("out of memory")

    def measured(notes, size, shape, rows, variants):
        if rows == 4096:
            raise RuntimeError("illegal address")
        for name in variants:
            notes.add(f"{rows}x{shape[0]}x{shape[1]} {name}", {"us": 1.0})

    monkeypatch.setattr(matmul, "_card", no_card)
    monkeypatch.setattr(matmul, "_measured", measured)
    matmul.matmul(matmuls)
    size, variants = matmul.FULL, {**matmul.VARIANTS, **matmul.HOPPER}
    assert len(matmuls.wrong) == 1 + len(size.shapes) * len(variants)
    assert matmuls.has("1x4096x1024 W8A16, Mosaic")
    assert not matmuls.has("4096x4096x1024 W8A16, Mosaic")


def test_many_rows_which_take_long_do_not_leave_out_few(matmuls, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(matmul.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(matmuls, "_plan", matmuls._plan._replace(started=0.0, seconds=90.0))
    monkeypatch.setattr(matmul, "_card", lambda *_: None)
    done = []

    def measured(notes, size, shape, rows, variants):
        done.append((shape, rows, matmul.BF16 in variants))
        clock[0] += 40.0 if rows == 4096 and matmul.BF16 in variants else 1.0

    monkeypatch.setattr(matmul, "_measured", measured)
    matmul.matmul(matmuls)
    plain = {(shape, rows) for shape, rows, has_bf16 in done if has_bf16}
    first, *others = matmul.FULL.shapes
    few = [rows for rows in matmul.FULL.rows if rows != 4096]
    # After the first shape's 4,096 rows there is no time for the others'.
    assert plain == {(first, 4096), *product((first, *others), few)}


def test_rows_that_torch_printed_before_its_time_was_over_are_kept(plan, monkeypatch):
    def run(command, **options):
        printed = b'{"name": "torch", "version": "2"}\n{"name": "a", "us": 1.0}\n{"na'
        raise subprocess.TimeoutExpired(command, options["timeout"], output=printed)

    monkeypatch.setattr(subprocess, "run", run)
    notes = Notes(plan._replace(path=None), "matmul")
    matmul._beside_torch(notes, matmul.TINY)
    assert notes.row("a")["us"] == 1.0
    assert "timed out" in notes.row("torch")["note"]


# The command line -------------------------------------------------------------------------------------------------


class Finished:
    def __init__(self, status):
        self.returncode = status


def test_each_part_is_a_process_and_one_that_fails_does_not_stop_the_others(
    monkeypatch, capsys, tmp_path
):
    called = []

    def run(command, stdout, timeout):
        called.append((command[3:], timeout))
        if command[4] == "layer":
            raise subprocess.TimeoutExpired(command, timeout)
        return Finished(int(command[4] == "matmul"))

    monkeypatch.setattr(subprocess, "run", run)
    assert script.main(["--record", "a.json"]) == 1
    parts = [["--part", part, "--record", "a.json"] for part in script.PARTS]
    assert [command for command, _ in called] == parts
    assert called[0][1] == script.LIMITS["check"] + script.GRACE
    assert capsys.readouterr().err.endswith("not all right: matmul, layer\n")


def test_all_parts_take_less_than_six_minutes():
    assert set(script.LIMITS) == set(script.PARTS)
    assert sum(script.LIMITS.values()) < 360


def test_the_command_line_without_click_is_the_same(monkeypatch, capsys, tmp_path):
    asked = []
    monkeypatch.setattr(script, "main", lambda arguments: asked.append(arguments) or 1)
    record = str(tmp_path / "a.json")
    assert cli.main(["bench", "gpu", "--record", record, "--part", "layer", "--tiny"]) == 1
    assert asked == [["--record", record, "--tiny", "--part", "layer"]]
    assert capsys.readouterr().err == "sqjax: not all of it is right: see the rows above\n"


def test_it_starts_without_click():
    code = "import sys; sys.modules['click'] = None; from sqjax.commands.gpu import script, check"
    code += ", matmul, llama"
    subprocess.run([sys.executable, "-c", code], check=True)


# All of it --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu") / "record.json"


def run_of(record, part):
    rows = read_record(record).rows
    [run] = [row for row in rows if row["part"] == part and row["name"] == "run"]
    return run, [row for row in rows if row["part"] == part and row is not run]


@pytest.mark.slow
@pytest.mark.each_case
@pytest.mark.parametrize("part", script.PARTS)
def test_a_tiny_run(record, monkeypatch, part):
    monkeypatch.setenv("XLA_FLAGS", "")  # a part may add to it
    assert script.main(["--record", str(record), "--tiny", "--part", part]) == 0
    run, rows = run_of(record, part)
    assert run["left_out"] == []
    assert run["card"] == "cpu"
    assert rows
    assert not [row for row in rows if "error" in row]
    if part == "check":
        assert all(row["holds"] for row in rows)
    json.dumps([rows], allow_nan=False)
    if part == "layer":
        # Nothing is measured again.
        assert script.main(["--record", str(record), "--tiny", "--part", part]) == 0
        assert run_of(record, part)[1] == rows
