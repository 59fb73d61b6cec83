"""What importing `sqjax.models` must not import, and what is said when an optional package is missing."""

import subprocess
import sys

import pytest

from sqjax.models.checkpoints.gguf import read_gguf
from sqjax.models.tokenizer import from_directory


@pytest.mark.slow  # another process imports jax
def test_import_is_light():
    heavy = ["gguf", "jinja2", "tokenizers", "transformers", "torch"]
    code = f"import sys, sqjax.models; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_missing_packages_name_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    for name in ("gguf", "tokenizers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install sqjax\[demo\]"):
        read_gguf(tmp_path / "model.gguf")
    with pytest.raises(ImportError, match=r"pip install sqjax\[demo\]"):
        from_directory(tmp_path)
