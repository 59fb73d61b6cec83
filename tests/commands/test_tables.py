"""Tables: the layout of each, as text and as Markdown, and Markdown files filled from records."""

from pathlib import Path

import numpy as np
import pytest

from sqjax.commands import cells, tables
from sqjax.commands.cells import Table
from sqjax.commands.layouts import LAYOUTS
from sqjax.commands.layouts_of_speed import QWIX, speeds
from sqjax.commands.records import Machine, Record, write_record

ROOT = Path(__file__).parents[2]


def demo_row(name, perplexity, prefill, decode):
    return {
        "name": name,
        "perplexity": perplexity,
        "weight_bytes": 134_500_000,
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
    }


def pair(scheme, difference, error):
    """Of a peer, and of ours beside it."""
    return {
        "table": "pairs",
        "scheme": scheme,
        "theirs": "torchao",
        "ours": "search",
        "their_perplexity": 37.3,
        "our_perplexity": 37.25,
        "their_seconds": 80.4,
        "our_seconds": 60.0,
        "loss_difference": difference,
        "standard_error": error,
    }


def own(name, losses, seconds):
    """Of ours alone."""
    perplexity = float(np.exp(np.mean(losses)))
    return {
        "table": "ours",
        "name": name,
        "losses": losses,
        "perplexity": perplexity,
        "seconds": seconds,
    }


def exact(family, theirs, spaces, every, refused):
    """A family with a tied head."""
    return {
        "family": family,
        "their_smoothquant": theirs,
        "their_spinquant": 0.3151,
        "smooth_error": 1.2e-6,
        "groups": 16,
        "all_groups": 16,
        "rotate_error": 2e-6,
        "spaces": spaces,
        "all_spaces": every,
        "untied": True,
        "refused": refused,
    }


DEMO = [demo_row("float32", 36.478, 1000.0, 50.0), demo_row("W8A8", 37.1, 1840.0, 75.0)]
SCHEMES = [
    {
        "name": "W4A16 g128",
        "unsmoothed_perplexity": 52.391,
        "smoothed_perplexity": 57.566,
        "weight_bytes": 73_400_000,
    }
]


def timed(table, name, **seconds):
    return {"table": table, "name": name} | {f"{c} seconds": s for c, s in seconds.items()}


BENCHMARK = [
    timed("matmul", "bare", M=0.001),
    timed("matmul", "W8A8_O1", M=0.00125),
    timed("matvec", "float32", wide=0.004),
    timed("matvec", "W8A16", wide=0.001),
    timed("model", "float32", prefill=0.08, decode=0.04) | {"model": "first"},
    timed("model", "W8A8_O1", prefill=0.04, decode=0.01) | {"model": "first"},
    timed("model", "W8A16", prefill=0.16, decode=0.02) | {"model": "first"},
    timed("model", QWIX, prefill=0.06, decode=0.08) | {"model": "first"},
    timed("model", "float32", prefill=0.5, decode=0.5) | {"model": "second"},
]


def cached(weights, cache, perplexity, nbytes=0.0):
    return {
        "table": "caches",
        "weights": weights,
        "cache": cache,
        "perplexity": perplexity,
        "bytes_per_token": nbytes,
    }


def step(weights, batch, context, seconds, floor):
    return {
        "table": "steps",
        "weights": weights,
        "batch": batch,
        "context_tokens": context,
        "seconds_per_step": seconds,
        "floor_seconds_per_step": floor,
    }


DECODE = [
    cached("float32", "none", 40.0),
    cached("float32", "int8", 40.06, 12240.0),
    cached("W8A8", "none", 50.0),
    cached("W8A8", "int8", 49.5, 12240.0),
    step("float32", 16, 512, 0.045, 0.02),
    step("W8A8", 16, 512, 0.030, 0.0033),
    step("float32", 1, 128, 0.030, 0.02),
    step("W8A8", 1, 128, 0.012, 0.0019),
]

ROTATION = [
    {"table": "prefill", "rotation": "none", "seconds": 0.3, "core_seconds": 0.5},
    {"table": "prefill", "rotation": "blocks of 64", "seconds": 0.3, "core_seconds": 0.52},
    {
        "table": "finding",
        "layers": 8,
        "trace_seconds": 0.61,
        "find_seconds": 1.26,
        "fold_seconds": 0.3,
        "groups": 33,
        "spaces": 9,
    },
    {"table": "W4A4", "model": "encoder", "recipe": "gptq", "loss": 0.2312},
    {"table": "W4A4", "model": "decoder", "recipe": "gptq", "loss": 0.4},
    {"table": "W4A4", "model": "decoder", "recipe": "`rotate`", "loss": 0.1},
]

#: {name of a table: (rows, its titles, its lines)}
EXPECTED = {
    "demo": (
        DEMO,
        ("", "perplexity", "MB", "prefill tok/s", "decode tok/s"),
        [
            ("float32", "36.48", "134", "1000 (1.00x)", "50.0 (1.00x)"),
            ("W8A8", "37.10", "134", "1840 (1.84x)", "75.0 (1.50x)"),
        ],
    ),
    "schemes": (
        SCHEMES,
        ("every matmul, the tied head too", "unsmoothed", "smoothed", "MB"),
        [("W4A16 g128", "52.39", "57.57", "73")],
    ),
    "benchmark": (
        BENCHMARK,
        ("", "prefill", "decode"),
        [
            ("float32", "1.00x (80.00)", "1.00x (40.00)"),
            ("W8A8_O1", "2.00x (40.00)", "4.00x (10.00)"),
            ("W8A16", "0.50x (160.00)", "2.00x (20.00)"),
            (QWIX, "1.33x (60.00)", "0.50x (80.00)"),
            ("W8A8_O1 to qwix", "1.50x", "8.00x"),
        ],
    ),
    "benchmark rows": (
        BENCHMARK,
        ("", "wide"),
        [("float32", "1.00x (4.00)"), ("W8A16", "4.00x (1.00)")],
    ),
    "benchmark matmul": (
        BENCHMARK,
        ("", "M"),
        [("bare", "1.00x (1.00)"), ("W8A8_O1", "0.80x (1.25)")],
    ),
    "memory": (
        [
            {
                "job": "prefill",
                "parameters": 2_000_000_000,
                "parameters_of_a_layer": 80_000_000,
                "peak_bytes": 3_100_000_000,
            }
        ],
        ("", "peak MB", "model in float32, MB", "in int8", "one layer in float32"),
        [
            (
                "load_quantized to W8A8, prefill of 64 tokens",
                *("3100", "8000", "2000", "320"),
            )
        ],
    ),
    "peers": (
        [
            pair("W8A8", -0.002, 0.001),  # 1.96 standard errors are less than that
            pair("W8A8", -0.002, 0.0011),
            pair("W4A16", 0.002, 0.001),
            {"table": "ours", "losses": [3.0]},
        ],
        (
            *("", "theirs", "perplexity", "core seconds"),
            *("ours", "perplexity", "core seconds", "ours - theirs, nats a token", ""),
        ),
        [
            (
                *("W8A8", "torchao", "37.300", "80", "search", "37.250", "60"),
                *("-0.0020 ± 0.0020", "ahead"),
            ),
            (
                *("W8A8", "torchao", "37.300", "80", "search", "37.250", "60"),
                *("-0.0020 ± 0.0022", "equal within the interval"),
            ),
            (
                *("W4A16", "torchao", "37.300", "80", "search", "37.250", "60"),
                *("+0.0020 ± 0.0020", "behind"),
            ),
        ],
    ),
    "choices": (
        [
            {"table": "pairs"},
            own("w4a16-awq", [3.0, 3.25], 60.4),
            own("float", [3.0, 3.0], 1.0),
            own("unknown", [3.0, 3.0], 1.0),
        ],
        ("", "perplexity", "more than float", "core seconds"),
        [
            ("float32", "20.086", "", ""),
            # expm1(0.125), and 1.96 standard errors of 0.125.
            ("W4A16_G64, `awq`", "22.760", "13.31% ± 24.50%", "60"),
        ],
    ),
    "int4 encoder": (
        [
            {
                "recipe": "GPTQ",
                "mean_cosine": 0.98844,
                "least_cosine": 0.96066,
                "same_nearest": 0.8325,
                "core_seconds": 14.7,
            }
        ],
        ("W4A16_G64", "mean cosine", "least cosine", "same nearest sentence", "core seconds"),
        [("GPTQ", "0.9884", "0.9607", "83.2%", "15")],
    ),
    "exactness": (
        [
            exact("Gemma 2", 0.6, 4, 5, "no group folds the gain norm, and Q does not pass it"),
            exact("AFMoE", 0.16, 0, 2, "no group folds the gain norm"),
            {"family": "Qwen3.5-MoE", "their_smoothquant": 0.87, "their_spinquant": None},
        ],
        (
            *("logits off by", "their SmoothQuant", "`smooth`", "groups proved"),
            *("their SpinQuant", "`rotate`", "spaces proved", "refused"),
        ),
        [
            (
                *("Gemma 2", "0.60", "1.2e-06", "16 of 16", "0.315", "2.0e-06, untied"),
                *("4 of 5", "no group folds the gain norm"),
            ),
            (
                *("AFMoE", "0.16", "1.2e-06", "16 of 16", "0.315", "refused"),
                *("0 of 2", "no group folds the gain norm"),
            ),
            ("Qwen3.5-MoE", "0.87", "not read here", *[""] * 5),
        ],
    ),
    "rotation costs": (
        ROTATION,
        ("rotated before down_proj", "by the clock", "of the cores"),
        [
            ("none", "0.300 s, +0.0%", "0.500 s, +0.0%"),
            ("blocks of 64", "0.300 s, +0.0%", "0.520 s, +4.0%"),
        ],
    ),
    "rotation finding": (
        ROTATION,
        ("layers", "to trace", "to find", "to fold", "groups", "spaces"),
        [("8", "0.6 s", "1.3 s", "0.3 s", "33", "9")],
    ),
    "rotation gains": (
        ROTATION,
        ("W4A4 in groups of 128", "encoder", "decoder"),
        [("gptq", "0.231", "0.400"), ("`rotate`", "", "0.100")],
    ),
    "decode caches": (
        DECODE,
        ("cache", "bytes a token", "float32 weights", "W8A8 weights"),
        [("none", "", "40.00", "50.00"), ("int8", "12240", "+0.15%", "-1.00%")],
    ),
    "decode steps": (
        DECODE,
        ("batch", "tokens in the cache", "float32", "W8A8, int8 cache", "ratio", "floor"),
        [
            ("1", "128", "30.0 ms", "12.0 ms", "2.50x", "1.9 ms"),
            ("16", "512", "45.0 ms", "30.0 ms", "1.50x", "3.3 ms"),
        ],
    ),
}


@pytest.mark.parametrize("name", EXPECTED)  # those of GPUs: test_gpu_tables.py
def test_the_layout(name):
    rows, titles, lines = EXPECTED[name]
    assert LAYOUTS[name](rows) == Table(titles, lines)


def test_a_row_that_was_not_measured_says_why():
    note = {"table": "model", "name": QWIX, "note": "not installed"}
    table = speeds([timed("model", "float32", a=1.0, b=1.0), note])
    assert table.lines[1:] == [(QWIX, "not installed", "")]


def test_text_and_markdown():
    table = Table(("", "MB"), [("float32", "538"), ("W8A8", "1")])
    assert cells.text(table) == "          MB\nfloat32  538\nW8A8       1"
    assert cells.markdown(table) == "|  | MB |\n| --- | --- |\n| float32 | 538 |\n| W8A8 | 1 |"


# Markdown files -------------------------------------------------------------------------------

MARKED = """# Title
<!-- table: records/demo.json demo -->
<!-- end -->
Text.

<!-- table: records/decode.json decode steps -->
| by hand |
<!-- end -->
"""


@pytest.fixture
def root(tmp_path):
    """A repository with two records and a README whose tables are empty, or written by hand."""
    folder = tmp_path / "benchmarks" / "records"
    folder.mkdir(parents=True)
    machine = Machine("AMD EPYC", [], 2)
    for command, rows in (("demo", DEMO), ("decode", DECODE)):
        record = Record(
            [command], machine, "0123abcd", "0.10.2", "3.11.9", "2026-11-27", 60.0, rows
        )
        write_record(folder / f"{command}.json", record)
    (tmp_path / "README.md").write_text(MARKED)
    return tmp_path


def test_check_names_each_table_that_disagrees_and_write_fills_it(root, capsys):
    readme = root / "README.md"
    for arguments in (["README.md"], ["--check", "README.md"]):
        assert tables.main(arguments, root) == 1
        said = capsys.readouterr().err
        assert "README.md: the table 'records/demo.json demo' disagrees" in said
        assert "README.md: the table 'records/decode.json decode steps' disagrees" in said
        assert "--write README.md" in said
        assert readme.read_text() == MARKED

    assert tables.main(["--write", "README.md"], root) == 0
    filled = readme.read_text()
    assert tables.main(["--check", "README.md"], root) == 0
    assert filled.startswith("# Title\n<!-- table: records/demo.json demo -->\n\n|  | perplexity |")
    assert "| W8A8 | 37.10 | 134 | 1840 (1.84x) | 75.0 (1.50x) |\n" in filled
    pedigree = "jax 0.10.2, Python 3.11.9, commit 0123abcd, 2026-11-27"
    assert (
        f"\n\n*`sqjax demo` on 2 cores of AMD EPYC, {pedigree}.*\n\n<!-- end -->\nText.\n" in filled
    )
    assert "by hand" not in filled

    readme.write_text(filled.replace("1.84x", "1.94x"))
    assert tables.main(["--check", "README.md"], root) == 1
    said = capsys.readouterr().err
    assert "records/demo.json demo" in said
    assert "decode steps" not in said
    assert tables.main(["--write", "README.md"], root) == 0
    assert readme.read_text() == filled


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ("<!-- table: records/demo.json demo -->\n", "demo -->' has no end"),
        ("<!-- table: records/demo.json demo -->\n" * 2 + "<!-- end -->", "has no end"),
        ("<!-- table: records/demo.json dmeo -->\n<!-- end -->", "expected one of .*got 'dmeo'"),
        ("<!-- table: records/none.json demo -->\n<!-- end -->", "none.json: expected a record"),
        (
            "<!-- table: records/demo.json decode steps -->\n<!-- end -->",
            "expected rows of the table 'decode steps', .* made by `sqjax demo`",
        ),
    ],
)
def test_marks_that_can_not_be_filled(root, marks, message, capsys):
    with pytest.raises(ValueError, match=message):
        tables.fill(marks, root)
    (root / "other.md").write_text(marks)
    assert tables.main(["--write", "other.md", "README.md"], root) == 1
    assert capsys.readouterr().err.startswith("other.md: ")
    assert (root / "other.md").read_text() == marks
    assert (
        "by hand" not in (root / "README.md").read_text()
    )  # the other file is filled all the same


def test_the_tables_of_this_repository_agree_with_their_records():
    if not (ROOT / "benchmarks" / "records").is_dir():
        pytest.skip("no record has been committed yet")
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    names = [str(page.relative_to(ROOT)) for page in pages]
    assert tables.main(["--check", *names], ROOT) == 0
