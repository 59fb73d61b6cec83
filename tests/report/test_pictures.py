"""Pictures: what is drawn is what was given; nothing of matplotlib's global state is touched."""

import sys

import numpy as np
import pytest

from sqjax import plots
from sqjax.report import drawing
from sqjax.report.activations import pooled
from sqjax.report.kinds import kinds, merged, split_number

LAYERS = {f"layers/{i}/{name}/kernel": 2.0 + i for i in range(3) for name in ("q", "k")}


def test_pooled_keeps_the_largest_of_each_block():
    x = np.zeros((7, 10))
    x[5, 8] = -3.14159
    found = np.array(pooled(x, 2, 5))
    assert found.shape == (2, 5)
    assert found.max() == found[1, 4] == 3.14
    assert np.count_nonzero(found) == 1
    assert pooled(x, 100, 100)[5][8] == 3.14


def test_kinds_are_sites_that_differ_by_their_layer():
    assert split_number("h_3/mlp/2/w") == ("h_#/mlp/2/w", 3)
    assert split_number("conv1x1/kernel") == ("conv1x1/kernel", None)
    assert [kind.label for kind in kinds(["Dense_0/kernel", "Dense_1/kernel"])] == [
        "Dense_#/kernel"
    ]
    found = kinds([*LAYERS, "lm_head/kernel", "a/b"])
    assert [(kind.label, kind.numbers) for kind in found] == [
        ("q", (0, 1, 2)),
        ("k", (0, 1, 2)),
        ("lm_head", ()),
        ("a/b", ()),
    ]
    assert found[1].paths == tuple(f"layers/{i}/k/kernel" for i in range(3))
    [(both, values)] = merged(found[:2], LAYERS)
    assert (both.label, values) == ("q, k", (2.0, 3.0, 4.0))


def test_errors_have_a_panel_for_each_kind_and_leave_out_what_is_not_finite():
    first = {**LAYERS, "head": None}
    second = {path: 40.0 for path in LAYERS} | {"head": np.inf, "layers/1/q/kernel": None}
    drawn = plots.errors(first, second, ("O3", "O1"))
    q, _, alone = drawn.axes
    assert [axes.get_title() for axes in drawn.axes] == ["q", "k", "not in layers"]
    old, new = q.get_lines()
    assert old.get_xydata().tolist() == [[0, 2], [1, 3], [2, 4]]
    assert new.get_ydata()[[0, 2]].tolist() == [40, 40]
    assert np.isnan(new.get_ydata()[1])
    assert np.isnan([line.get_ydata()[0] for line in alone.get_lines()]).all()
    assert [text.get_text() for text in drawn.legends[0].texts] == ["O3", "O1"]


def test_outliers_and_alphas_and_the_tradeoff_show_their_numbers():
    before, after = plots.outliers(LAYERS, dict.fromkeys(LAYERS, 1.5)).axes
    [line] = before.get_lines()  # q and k see one activation
    assert line.get_label() == "q, k"
    assert line.get_ydata().tolist() == [2, 3, 4]
    assert after.get_lines()[0].get_ydata().tolist() == [1.5] * 3

    [axes] = plots.alphas({0.9: 41.0, 0.5: 39.5}, exact=38.0, unsmoothed=60.0).axes
    points, plain, exact = axes.get_lines()
    assert points.get_xydata().tolist() == [[0.5, 39.5], [0.9, 41.0]]
    assert {plain.get_ydata()[0], exact.get_ydata()[0]} == {60.0, 38.0}
    assert "39.50" in [text.get_text() for text in axes.texts]

    [axes] = plots.tradeoff([("float", 4e6, 30.0, 100.0), ("W8A8", 1e6, 31.0, None)]).axes
    assert [dot.get_offsets().tolist() for dot in axes.collections] == [[[4, 30]], [[1, 31]]]
    assert [text.get_text() for text in axes.texts] == ["float\n100 tokens/s", "W8A8"]


@pytest.mark.slow
def test_a_surface_says_how_high_it_is():
    x = np.ones((8, 16))
    x[:, 3] = 250
    drawn = plots.surface(x, x / x.max(0), what="|W|", rows="output")
    titles = [text.get_text() for text in drawn.texts]
    assert titles == ["before smoothing: up to 250", "after smoothing: up to 1"]
    assert drawn.axes[0].get_ylabel() == "output"
    assert drawing.svg(drawn, "a").count("<image") == 2
    with pytest.raises(ValueError, match="expected two matrices of one shape"):
        plots.surface(x, x[:2])


def test_a_picture_for_a_page_has_the_page_s_own_ink_and_stands_on_nothing():
    drawn = plots.alphas({0.5: 1.0})
    text = drawing.svg(drawn, "one")
    assert text.startswith("<svg")
    assert text.endswith("</svg>")
    assert "currentColor" in text
    assert drawing.INK not in text
    assert "#ffffff" not in text
    assert "metadata" not in text
    assert drawing.svg(plots.alphas({0.5: 1.0}), "one") == text


def test_pyplot_is_not_loaded_and_formulas_are_no_formulas():
    drawn = plots.errors({"a$b": 1.0, "_c": 2.0}, {"a$b": 2.0, "_c": 3.0})
    drawn.savefig("/dev/null", format="svg")
    assert "matplotlib.pyplot" not in sys.modules


def test_series_of_other_sites_or_of_none_are_refused():
    with pytest.raises(ValueError, match="errors: head is in one of the two only"):
        plots.errors(LAYERS, {**LAYERS, "head": 1.0})
    with pytest.raises(ValueError, match="outliers: expected at least one site"):
        plots.outliers({})
    with pytest.raises(ValueError, match="alphas: expected at least one point"):
        plots.alphas({})


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'sqjax\[plots\]'"):
        plots.alphas({0.5: 1.0})
