"""Leaves by name: paths, patterns that choose among them, near misses, and checks that name the first bad leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqjax._names import braced, first_matches, near_misses
from sqjax._shapes import mesh_axes
from sqjax._trees import check_arrays, check_finite, is_concrete, map_named, named_leaves

NAMES = ["layers/0/q_proj/kernel", "layers/0/k_proj/kernel", "norm/scale"]


def test_the_first_pattern_that_is_found_in_a_name_wins():
    found = first_matches(["q_proj", "layers", "kernel$"], NAMES, "rule")
    assert found == {NAMES[0]: "q_proj", NAMES[1]: "layers", NAMES[2]: None}
    assert first_matches([], NAMES, "rule") == dict.fromkeys(NAMES)


@pytest.mark.parametrize(
    ("pattern", "names", "error"),
    [
        ("(", NAMES, r"rule '\(' is not a regular expression: "),
        ("q_porj", NAMES, r"rule 'q_porj' matches nothing. Near misses: 'layers/0/q_proj/kernel'"),
        ("w", [], r"rule 'w' matches nothing. Near misses: there are no names at all"),
    ],
)
def test_patterns_that_choose_nothing_are_refused(pattern, names, error):
    with pytest.raises(ValueError, match=error):
        first_matches([pattern], names, "rule")


def test_near_misses_are_five_at_most_the_nearest_first():
    names = [f"layers/{i}/kernel" for i in range(8)]
    assert near_misses("LAYERS/7/KERNEL", names).split(", ")[0] == "'layers/7/kernel'"
    assert near_misses("kernels", names).count("'") == 10


@pytest.mark.parametrize(
    ("paths", "text"),
    [
        (["a/b/c"], "a/b/c"),
        ([], ""),
        (["l/0/q/kernel", "l/0/k/kernel"], "l/0/{q, k}/kernel"),
        (["l/0/q/kernel", "l/0/mlp/up/kernel"], "l/0/{q, mlp/up}/kernel"),
        (["norm/bias", "norm/scale"], "norm/{bias, scale}"),
        (["a", "b"], "a, b"),
        (["a/x", "b/y"], "a/x, b/y"),
        (["a/b", "a/b/c"], "a/b, a/b/c"),
    ],
)
def test_what_paths_share_is_said_once(paths, text):
    assert braced(paths) == text


def test_leaves_have_the_path_of_their_keys():
    tree = {"layers": [{"w": 1.0}, {"w": 2.0}], "b": (3.0,)}
    paths, leaves, treedef = named_leaves(tree)
    assert dict(zip(paths, leaves, strict=True)) == {
        "b/0": 3.0,
        "layers/0/w": 1.0,
        "layers/1/w": 2.0,
    }
    assert jax.tree.unflatten(treedef, leaves) == tree
    marked = map_named(lambda path, x: f"{path}={x:g}", tree)
    assert marked["layers"][1]["w"] == "layers/1/w=2"
    whole = named_leaves(tree, is_leaf=lambda x: isinstance(x, list))
    assert whole[0] == ("b/0", "layers")
    with pytest.raises(ValueError, match=r"one path, \['a/b'\]; rename a key that holds a '/'"):
        named_leaves({"a/b": 1, "a": {"b": 2}})


def test_checks_name_the_first_bad_leaf():
    check_arrays({"w": np.ones(2), "b": jax.ShapeDtypeStruct((2,), jnp.float32)})
    with pytest.raises(ValueError, match="parameter a/rate: expected an array, got float"):
        check_arrays({"a": {"rate": 0.1}, "b": "text"})
    with pytest.raises(ValueError, match=r"parameter \(the tree itself\): expected an array"):
        check_arrays(0.1)
    bad = {"ids": np.ones(2, int), "v": np.ones(3), "w": np.array([1, np.nan, np.inf], np.float32)}
    with pytest.raises(ValueError, match="input w: 2 of 3 values are NaN or infinite; finite"):
        check_finite(bad, "input")
    with pytest.raises(ValueError, match=r"input \(the array itself\): 1 of 1 values"):
        check_finite(jnp.full(1, -jnp.inf), "input")


def test_tracers_pass_and_closed_over_values_are_checked():
    bad = jnp.full(2, jnp.nan)

    @jax.jit
    def traced(x):
        assert not is_concrete(x)
        check_finite({"x": x}, "input")
        check_finite({"bad": bad}, "parameter")
        return x

    with pytest.raises(ValueError, match="parameter bad: 2 of 2 values are NaN"):
        traced(bad)


@pytest.mark.parametrize("size", [8, 2**20 + 1])  # numpy's look, and the compiled one
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_a_nan_is_found_in_arrays_of_every_size_and_kind(size, dtype, kind):
    fine = np.ones(size, jnp.dtype(dtype))
    bad = fine.copy()
    bad[3] = np.nan
    check_finite(kind(fine), "input")
    with pytest.raises(ValueError, match=f"input .*: 1 of {size} values are NaN"):
        check_finite({"x": kind(bad)}, "input")
    # What is allowed takes nothing away from the others.
    with pytest.raises(ValueError, match="values are NaN"):
        check_finite(kind(bad), "input", but=1.0)


@pytest.mark.parametrize(("entry", "names"), [(None, ()), ("x", ("x",)), (("x", "y"), ("x", "y"))])
def test_mesh_axes_of_an_entry(entry, names):
    assert mesh_axes(entry) == names
