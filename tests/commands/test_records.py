"""Records: what they hold, what is read back, and the pedigree of a figure."""

import json
import platform
import subprocess

import jax
import pytest

from sqjax.commands.records import Machine, Record, make_record, read_record, write_record
from sqjax.report import machine

ROWS = [{"name": "float32", "seconds": 0.5}, {"name": "W8A8", "seconds": 0.25}]
CPUINFO = """processor\t: 0
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC
flags\t\t: fpu avx512_vnni avx512_bf16 sse
"""


def test_a_record_is_read_back_as_it_was_written(tmp_path):
    path = tmp_path / "demo.json"
    record = make_record(["demo", "--quick"], ROWS, 1.25)
    write_record(path, record)
    assert read_record(path) == record
    fields = json.loads(path.read_text())
    assert list(fields) == [
        *("command", "machine", "commit", "jax", "python", "date", "seconds", "rows")
    ]
    assert fields["command"] == ["demo", "--quick"]
    assert set(fields["machine"]) == {"cpu", "features", "cores"}
    assert fields["machine"]["cores"] >= 1
    assert (fields["jax"], fields["python"]) == (jax.__version__, platform.python_version())
    assert fields["rows"] == ROWS


def test_the_machine_is_what_cpuinfo_says(tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "CPUINFO", cpuinfo)
    elsewhere = machine.this_machine()
    assert elsewhere.features == []
    assert elsewhere.cpu
    cpuinfo.write_text(CPUINFO)
    found = machine.this_machine()
    assert found.cpu == "AMD EPYC, cpu family 26, model 2"
    assert found.features == ["avx512_vnni", "avx512_bf16"]


def git(root, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(root), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_this_checkout_alone(tmp_path):
    assert machine.current_commit(tmp_path) is None
    git(tmp_path, "init")
    package = tmp_path / "sqjax"
    package.mkdir()
    source = package / "code.py"
    source.write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert machine.current_commit(tmp_path) == commit
    # Inside a checkout of something else: for example in an environment's site-packages.
    assert machine.current_commit(package) is None
    (tmp_path / "README.md").write_text("not code")
    assert machine.current_commit(tmp_path) == commit
    source.write_text("2")
    assert machine.current_commit(tmp_path) == f"{commit}-dirty"


def test_the_commit_is_unknown_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.current_commit() is None


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["demo", "--record", "demo.json", "--quick"], "`sqjax demo --quick`"),
        (["demo", "--record=demo.json"], "`sqjax demo`"),
    ],
)
def test_the_pedigree_names_machine_versions_commit_and_date(command, shown):
    machine = Machine("AMD EPYC", ["avx512_vnni"], 2)
    commit = "0123456789abcdef-dirty"
    record = Record(command, machine, commit, "0.10.2", "3.11.9", "2026-11-27", 60.0, ROWS)
    assert record.pedigree == (
        f"{shown} on 2 cores of AMD EPYC (avx512_vnni), jax 0.10.2, Python 3.11.9, "
        "commit 0123456789-dirty, 2026-11-27"
    )
    elsewhere = record._replace(machine=Machine("Power9", [], 1), commit=None)
    assert "on 1 core of Power9, jax" in elsewhere.pedigree
    assert "no commit" in elsewhere.pedigree


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"machine": {"cpu": "x"}}'])
def test_what_is_no_record_is_refused(tmp_path, content):
    path = tmp_path / "demo.json"
    with pytest.raises(ValueError, match=r"demo\.json: expected a record, got no such file"):
        read_record(path)
    path.write_text(content)
    with pytest.raises(ValueError, match=r"demo\.json: expected a JSON object with the fields"):
        read_record(path)
