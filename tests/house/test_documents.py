"""README and docs: their Python runs, in order, page by page; their links and pictures are there."""

import ast
import re
from pathlib import Path

import jax
import pytest
from real_models import first_layers, smollm2

import sqjax

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs" / "pages").glob("*.md")),
]
#: A block of Python; a comment in the line before it says that it is slow (a real model is fetched).
BLOCK = re.compile(r"(<!-- slow -->\n)?```python\n(.*?)```", re.S)
#: [text](target), without targets on the internet and places in the same page.
LINK = re.compile(r"\]\((?!http|#)([^)#\s]+)")


def blocks(page, slow):
    """The Python blocks of a page that are run; slow ones are left out unless asked for."""
    found = BLOCK.findall(page.read_text())
    return [code for marked, code in found if slow or not marked]


def run(page, slow):
    """Runs the blocks of a page one after another, in one namespace, as a reader would."""
    names = {"__name__": "__main__"}
    for number, code in enumerate(blocks(page, slow), 1):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            exec(compile(code, f"{page.name}, block {number}", "exec"), names)


@pytest.mark.slow
@pytest.mark.each_case
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, capsys):
    run(page, slow=False)


#: Pages with blocks that fetch a real model.
REAL = ["docs/pages/index.md", "docs/pages/language-models.md", "docs/pages/model-families.md"]
REAL = [pytest.param(page, marks=pytest.mark.every_case) for page in ["README.md", *REAL]]


def run_with_a_real_model(name):
    assert len(blocks(ROOT / name, slow=True)) > len(blocks(ROOT / name, slow=False))
    run(ROOT / name, slow=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_the_python_of_a_page_runs_with_a_real_model(name, capsys):
    run_with_a_real_model(name)


@pytest.mark.slow
def test_the_python_of_the_readme_runs_with_the_first_layers_of_its_model(monkeypatch, capsys):
    one_layer = first_layers(*smollm2(), 1)
    monkeypatch.setattr(sqjax.models, "load", lambda name: one_layer)
    run_with_a_real_model("README.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_pictures_are_there(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def refusals(path):
    """Of every reason that a file gives to `Refused(...)`, the longest piece that is always the same."""
    for call in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(call, ast.Call) and getattr(call.func, "id", None) == "Refused"):
            continue
        inside = list(ast.walk(call))
        formatted = [node for node in inside if isinstance(node, ast.JoinedStr)]
        pieces = [[part for part in text.values if is_text(part)] for text in formatted]
        within = {id(part) for text in formatted for part in ast.walk(text)}
        pieces += [[node] for node in inside if is_text(node) and id(node) not in within]
        yield from (max((part.value for part in parts), key=len).strip() for parts in pieces)


def is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_every_reason_why_a_scale_does_not_fold_is_explained():
    folding = ROOT / "sqjax" / "folding"
    reasons = {reason for path in folding.glob("*.py") for reason in refusals(path)}
    assert {"compares its channels", "adds up its channels", "it has no channels"} <= reasons
    page = (ROOT / "docs" / "pages" / "when-something-is-refused.md").read_text()
    assert sorted(reason for reason in reasons if reason not in page) == []
    assert "folding it with powers of two changed a bit of fn's output" in page


def test_every_public_name_is_in_the_reference():
    import sqjax

    presets = {n for n in sqjax.__all__ if isinstance(getattr(sqjax, n), sqjax.Scheme)}
    text = (ROOT / "docs" / "pages" / "reference.md").read_text()
    missing = [n for n in sqjax.__all__ if n not in presets and f"::: sqjax.{n}\n" not in text]
    assert not missing
    schemes = (ROOT / "docs" / "pages" / "choosing-a-scheme.md").read_text()
    assert not [name for name in presets if f"`{name}`" not in schemes]
