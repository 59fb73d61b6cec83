"""The README's two commands, and the examples. (tests/house runs the README's Python.)"""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_readme_has_exactly_two_setup_commands():
    commands = re.findall(r"^python -m pip install.*$", (ROOT / "README.md").read_text(), re.M)
    assert len(commands) == 2
    assert "sqjax demo" in commands[0]
    assert "pytest" in commands[1]


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_say_how_to_run(path):
    source = path.read_text()
    assert f"python examples/{path.name}" in source
    compile(source, path.name, "exec")


@pytest.mark.slow  # because they import transformers and flax
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_import_what_there_is(path):
    runpy.run_path(str(path), run_name="not main")
