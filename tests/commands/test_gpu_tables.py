"""The tables of the record that a visit to a GPU left, from its rows as they are."""

from pathlib import Path

import pytest

from sqjax.commands.layouts import LAYOUTS
from sqjax.commands.records import read_record

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture(scope="module")
def record():
    return read_record(GPU / "second_h200.json")


def cells(record, layout):
    return {line[0]: line[1:] for line in LAYOUTS[layout](record.rows).lines}


def test_matmuls_are_ratios_to_bfloat16_at_the_same_rows(record):
    us = {r["name"]: r["us"] for r in record.rows if r["part"] == "matmul" and "us" in r}
    ratio = us["2048x4096x14336 bf16"] / us["2048x4096x14336 bare int8"]
    table = cells(record, "gpu matmuls")
    assert table["bare int8"][-1] == f"{ratio:.2f}x (153 us)"
    assert table["bf16"][0].startswith("1.00x")


def test_the_model_says_what_was_not_measured(record):
    table = cells(record, "gpu model")
    assert table["W4A16"] == ("not measured", "0.39x (1.92 ms)")


def test_a_visit_is_a_column_a_case_with_ratios_and_memory():
    rows = [
        {"part": part, "name": f"{case} {name}", "ms": ms, "program_bytes": 5e6 * ms}
        for part, case, name, ms in (
            ("layer", "prefill 32", "bf16", 2.0),
            ("model", "prefill 32", "W8A8_O1", 4.0),
            ("model", "prefill 32", "bf16", 8.0),
        )
    ]
    rows.append({"part": "model", "name": "run"})
    table = LAYOUTS["gpu visit"](rows)
    assert table.titles == ("", "one layer, prefill 32", "prefill 32", "MB of a prefill")
    assert table.lines == [
        ("bf16", "1.00x (2.00 ms)", "1.00x (8.00 ms)", "40"),
        ("W8A8_O1", "not measured", "2.00x (4.00 ms)", "20"),
    ]


def test_kernels_show_the_fastest_block_size(record):
    table = cells(record, "gpu kernels")
    named = [
        r for r in record.rows if r["part"] == "mosaic" and "W8A8 2048x4096x14336" in r["name"]
    ]
    fastest = min(r["us"] for r in named if not r["name"].endswith("XLA"))
    assert table["W8A8, Mosaic prototype"][0] == f"{fastest:.0f} us"
    assert table["W4A16 in groups, Mosaic prototype"][0] == ""


def test_a_script_beside_the_records_is_named_as_it_was_run(record):
    assert record.pedigree.startswith("`python benchmarks/gpu/second.py --seconds 285` on 16 cores")
