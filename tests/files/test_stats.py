"""Statistics in a file: bit for bit the same, with the graph; files that hold none are refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sealing import sealed_again

import sqjax as sq


def mlp(params, x):
    h = x * params["norm"][None]
    return jax.nn.relu(h @ params["up"]) @ params["down"]


def calibrated(**options):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "norm": jnp.linspace(0.5, 2.0, 8),
        "up": jax.random.normal(keys[0], (8, 12)),
        "down": jax.random.normal(keys[1], (12, 4)),
    }
    return params, sq.calibrate(mlp, params, [jax.random.normal(keys[2], (16, 8))], **options)


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)  # the graph is part of it
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("histogram", [False, True])
def test_statistics_come_back(tmp_path, histogram):
    params, stats = calibrated(histogram=histogram)
    sq.save(tmp_path / "stats.safetensors", stats)
    got = sq.load(tmp_path / "stats.safetensors")
    assert isinstance(got, sq.Stats)
    assert got.graph == stats.graph
    assert len(got.graph.groups) == 2
    assert_same(got, stats)
    assert_same(got.merge(got), stats.merge(stats))
    smoothed, expected = sq.smooth(params, got, 0.5), sq.smooth(params, stats, 0.5)
    assert_same(smoothed, expected)
    assert str(got.graph) == str(stats.graph)


def test_beside_parameters_and_folded(tmp_path):
    params, stats = calibrated()
    folded = sq.fold_stats(stats, sq.scales(params, stats, 0.5))
    sq.save(tmp_path / "both.safetensors", {"params": params, "stats": [stats, folded]})
    got = sq.load(tmp_path / "both.safetensors")
    assert_same(got, {"params": params, "stats": [stats, folded]})
    rewritten = sq.smooth(params, got["stats"][0], 0.5)
    quantized = sq.quantize(rewritten, got["stats"][1], sq.W8A8_O3)
    expected = sq.quantize(sq.smooth(params, stats, 0.5), folded, sq.W8A8_O3)
    assert_same(quantized, expected)


def test_spaces_come_back_and_an_older_file_has_none(tmp_path):
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    stats = sq.calibrate(lambda p, x: x @ p["a"] @ p["b"], params, [jnp.ones((5, 3))])
    file = tmp_path / "stats.safetensors"
    sq.save(file, stats)
    assert [space.size for space in sq.load(file).graph.spaces] == [4]
    assert_same(sq.load(file), stats)
    changed(file, lambda ours: ours[1]["graph"].update(fields=ours[1]["graph"]["fields"][:9]))
    older = stats.graph._replace(spaces=(), space_refusals=())
    assert sq.load(file).graph == older


def changed(file, change):
    """The file with the JSON of its only node changed, and sealed again."""
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    tree = json.loads(header["__metadata__"]["tree"])
    change(tree["class"])
    header["__metadata__"]["tree"] = json.dumps(tree)
    new = json.dumps(header).encode()
    file.write_bytes(sealed_again(len(new).to_bytes(8, "little") + new + raw[start:]))


def first_group(ours):
    return ours[1]["graph"]["fields"][2][0]


def labels_of(group):
    return group["fields"][2][0][1]["fields"]


CHANGES = {
    "another class": (
        lambda ours: ours.__setitem__(0, "Other"),
        r"expected a class of sqjax, got 'Other'; .*import sqjax.models.* first",
    ),
    "another field": (
        lambda ours: ours[1].update(rotation=1),
        r"Stats: expected \['graph'\], got \['graph', 'rotation'\]; update sqjax",
    ),
    "a class that is none of ours": (
        lambda ours: ours[1]["graph"].update({"class": "Popen"}),
        r"does not describe a class \(KeyError\('Popen'\)\)",
    ),
    "labels that are none": (
        lambda ours: labels_of(first_group(ours)).__setitem__(1, {"zlib": "AAAA"}),
        "labels that are damaged",
    ),
    "a child too many": (
        lambda ours: ours[2].append(["more", {"list": []}]),
        r"does not describe a class",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_file_that_holds_none_is_refused(tmp_path, case):
    change, message = CHANGES[case]
    sq.save(tmp_path / "stats.safetensors", calibrated()[1])
    changed(tmp_path / "stats.safetensors", change)
    with pytest.raises(ValueError, match=f"load: .*stats.safetensors: .*{message}"):
        sq.load(tmp_path / "stats.safetensors")
