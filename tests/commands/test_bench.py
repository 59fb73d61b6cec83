"""`sqjax demo` and `sqjax bench`: which function runs with which arguments, records, errors."""

import json

import pytest

from sqjax.commands import benchmark, cli, decode, demo, embeddings, schemes
from sqjax.commands.records import read_record

DEMO = demo.Row("float32", 36.5, 538, 1000.0, 50.0)
SCHEME = schemes.Row("float32", 36.5, 36.5, 538)
EMBEDDING = embeddings.Row("float32", 1.0, 1.0, 1.0, 90, 50.0)
SPEED = {"table": "matvec", "name": "float32", "2048 to 8192 seconds": 0.002}


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every command that runs; none of them measures anything."""
    calls = []

    def stand_in(rows):
        def run(*arguments):
            print("a table")
            calls.append(arguments)
            return rows

        return run

    monkeypatch.setattr(demo, "demo", stand_in([DEMO]))
    monkeypatch.setattr(schemes, "compare", stand_in([SCHEME]))
    monkeypatch.setattr(embeddings, "embeddings", stand_in([EMBEDDING]))
    monkeypatch.setattr(benchmark, "benchmark", stand_in([SPEED]))
    monkeypatch.setattr(decode, "run", stand_in([SPEED]))
    return calls


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        (["demo", "--model", "a.gguf"], (demo.FULL, 0.85, "a.gguf", False)),
        (
            ["demo", "--quick", "--alpha", "0.5", "--model", "a.gguf", "--float-head"],
            (demo.QUICK, 0.5, "a.gguf", True),
        ),
        (["bench", "demo", "--quick"], (demo.QUICK, 0.85, "smollm2-135m", False)),
        (["bench", "schemes"], (demo.FULL, 0.85, "smollm2-135m")),
        (["schemes", "--quick", "--model", "dir"], (demo.QUICK, 0.85, "dir")),
        (["embeddings"], (embeddings.FULL, "all-minilm-l6-v2", 0.85)),
        (
            ["bench", "embeddings", "--quick", "--model", "dir", "--alpha", "0.5"],
            (embeddings.QUICK, "dir", 0.5),
        ),
        (["bench", "speed"], ()),
        (["benchmark", "--quick"], (benchmark.QUICK, ("llama-shaped",))),
        (["bench", "decode"], ("smollm2-135m", False, None)),
        (["decode", "--quick", "--only", "speed"], ("smollm2-135m", True, "speed")),
    ],
)
def test_a_command_runs_with_its_options(calls, arguments, call):
    assert cli.main(arguments) == 0
    assert calls == [call]


def test_the_whole_demo_shows_both_real_models(calls):
    assert cli.main(["demo"]) == 0
    assert calls == [(demo.FULL, 0.85, "smollm2-135m", False), (embeddings.QUICK,)]


@pytest.mark.parametrize(
    ("command", "rows"),
    [
        (["demo"], [DEMO._asdict()]),
        (["schemes"], [SCHEME._asdict()]),
        (["bench", "embeddings"], [EMBEDDING._asdict()]),
        (["benchmark"], [SPEED]),
        (["bench", "decode"], [SPEED]),
    ],
)
def test_a_record_holds_the_rows(calls, tmp_path, capsys, command, rows):
    path = tmp_path / "records" / "one.json"
    arguments = [*command, "--quick", "--record", str(path)]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == "a table\n"
    record = read_record(path)
    assert record.command == arguments
    assert record.rows == rows
    assert record.seconds >= 0


def test_json_is_all_that_stdout_holds(calls, capsys):
    assert cli.main(["bench", "schemes", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"rows": [SCHEME._asdict()]}
    assert err == "a table\n"


def test_errors_are_one_line(calls, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--record", str(tmp_path / "file" / "demo.json")]) == 2
    assert capsys.readouterr().err.startswith("sqjax: ")
    assert calls == []  # refused before anything is measured
    monkeypatch.undo()
    assert cli.main(["demo", "--model", "no/such/model"]) == 2
    assert "no/such/model" in capsys.readouterr().err


def test_a_record_that_can_not_be_written_is_refused_first(calls, tmp_path, capsys):
    assert cli.main(["demo", "--record", str(tmp_path)]) == 2
    assert "expected a file's path, got a directory" in capsys.readouterr().err
    assert calls == []


def test_an_interrupted_command_is_one_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "demo", interrupted)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "sqjax: interrupted\n"
