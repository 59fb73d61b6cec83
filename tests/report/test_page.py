"""The report's page: one file, nothing loaded, everything escaped, a table that sorts."""

import json
import re
import shutil
import subprocess
from functools import cache
from html.parser import HTMLParser
from importlib import resources

import numpy as np
import pytest

from sqjax.report import Record, html
from sqjax.report.record import Continuation, SiteRow, State, Surface, Variant

ATTACK = '<script>alert("1")</script>'
PATHS = [f"layers/{i}/{name}/kernel" for i in range(3) for name in ("q", "up")] + ["head"]


def site(number, path):
    before, after = State(20.0 + number, 0.0, 9.0), State(30.5 + number, 0.002, 2.0)
    absorbed = () if path == "head" else (f"{path}/norm",)
    refused = f"a residual reads it {ATTACK}" if path == "head" else ""
    return SiteRow(path, "W8A8", before, after, 4000, 1100, absorbed, refused)


def record(**fields):
    """A small one with something of everything."""
    variants = [Variant("float", 4000, 30.0, 100.0), Variant("unsmoothed", 1100, 60.0, 180.0)]
    return Record(
        **{
            "title": f"tiny {ATTACK}",
            "summary": "2 layers",
            "scheme": "W8A8",
            "alpha": 0.5,
            "text": "3 x 64 tokens",
            "variants": (*variants, Variant("smoothed", 1100, 31.5, 190.0)),
            "sites": tuple(site(i, path) for i, path in enumerate(PATHS)),
            "continuations": (Continuation("Once", {"float": ATTACK, "smoothed": "a & b"}),),
            "recipe": {"rule": "head=<none>"},
            "versions": {"jax": "0.10.2"},
            "machine": "2 cores",
            **fields,
        }
    )


@cache
def page():
    return html(record())


class Elements(HTMLParser):
    """Every element with its attributes; what is open at the end; the texts of the cells."""

    EMPTY = ("meta", "link", "input", "wbr")

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.cells = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open:
            self.cells[-1] += data


@pytest.mark.slow
def test_the_page_is_whole_and_has_every_site():
    elements = Elements(page())
    assert elements.open == []
    tags = [tag for tag, _ in elements.found]
    assert tags.count("svg") == 3  # outliers, errors, size
    assert tags.count("tr") == 1 + len(PATHS)
    rows = [elements.cells[i : i + 10] for i in range(0, len(elements.cells), 10)]
    assert [row[0] for row in rows] == PATHS
    assert rows[1][2:9] == ["21.0", "31.5", "+10.5", "0.200%", "9.0", "2.0", "0.00"]
    assert rows[1][9] == "layers/0/up/kernel/norm"
    assert rows[-1][9] == f"refused: a residual reads it {ATTACK}"
    for text in ("31.50", "5.0% more than float", "100.0% more", "3.64 times smaller"):
        assert text in page()


def test_nothing_is_loaded_and_the_policy_lets_only_its_own_script_run():
    loads = ("src", "href", "xlink:href", "action", "data")
    for tag, attributes in Elements(page()).found:
        for name in loads:
            target = attributes.get(name, "")
            inside = target.startswith(("data:", "#")) or not target
            assert inside, f"<{tag} {name}={target}>"
    in_css = re.findall(r"url\(([^)]*)\)", page())
    assert all(target.startswith(("#", "data:")) for target in in_css)
    assert "@import" not in page()
    assert "default-src 'none'" in page()
    assert page().count("<script") == 1
    assert "onclick" not in page()


def test_every_text_is_escaped():
    assert ATTACK not in page()
    assert page().count("&lt;script&gt;") >= 5  # title, heading, refusal (cell and value), text
    assert "head=&lt;none&gt;" in page()
    assert "a &amp; b" in page()


def test_a_record_without_prompts_alphas_and_speeds_has_no_such_parts():
    bare = record(
        variants=tuple(Variant(n, 10, 3.0) for n in ("float", "unsmoothed", "smoothed")),
        sites=(),
        continuations=(),
    )
    text = html(bare)
    for part in ("Texts side by side", "against alpha", "Speed of reading", "Error of the median"):
        assert part not in text
    assert "0 of 0 sites" in text


@pytest.mark.slow
def test_surfaces_and_alphas_are_drawn_where_there_are_some():
    rows = tuple(map(tuple, np.ones((4, 8)).tolist()))
    surfaces = [Surface(what, PATHS[0], rows, rows, (40, 80)) for what in ("activation", "weight")]
    full = record(surfaces=tuple(surfaces), alphas=((0.5, 31.5), (0.8, 30.9)))
    text = html(full)
    assert text.count("<svg") == 6
    assert "40 tokens by 80 channels" in text
    assert "40 outputs by 80 channels" in text
    assert Elements(text).open == []


def test_a_record_goes_through_json():
    made = record(alphas=((0.5, 31.5),))
    assert Record.from_dict(json.loads(json.dumps(made.as_dict()))) == made
    with pytest.raises(ValueError, match="expected a report's record"):
        Record.from_dict({"title": "x"})


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.parametrize(
    ("values", "descending", "expected"),
    [
        (["10", "9.5", "", "-1"], False, [3, 1, 0, 2]),
        (["10", "9.5", "", "-1"], True, [0, 1, 3, 2]),
        (["layers/10/q", "layers/9/q", "head"], False, [2, 1, 0]),
        (["1", "1", "0"], True, [0, 1, 2]),
    ],
)
def test_the_script_sorts_numbers_and_names_and_puts_what_is_missing_last(
    tmp_path, values, descending, expected
):
    script = tmp_path / "page.js"
    script.write_text((resources.files("sqjax.report") / "page.js").read_text("utf-8"))
    call = f"require('./page.js').order({json.dumps(values)}, {json.dumps(descending)})"
    run = ["node", "-e", f"console.log(JSON.stringify({call}))"]
    found = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == expected
