"""Operations that are linear, or keep the order, along an axis without channels: a scale passes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from traced import graph_of, normal, program_of

from sqjax.folding.certificate import certify

X = normal(6, 8)
PARAMS = {"norm": 1 + normal(1, 8) / 9, "w": normal(8, 5)}
IDS = jnp.array([2, 0, 4, 4, 7, 1])

#: What stands between the norm and the matmul: the norm must absorb the matmul's scale.
PASSED = {
    "stack": lambda h: jnp.stack([h, -h]),
    "stack, on the last axis": lambda h: jnp.stack([h, 2 * h], axis=-1)[..., 1],
    "tile": lambda h: jnp.tile(h, (3, 1)),
    "tile and cut": lambda h: jnp.tile(h, (1, 2))[:, 8:],
    "set rows": lambda h: jnp.zeros((9, 8)).at[IDS].set(h),
    "set rows of a batch": lambda h: jnp.zeros((2, 9, 8)).at[1, IDS].set(h),
    "set a window": lambda h: jnp.zeros((9, 8)).at[2:8].set(h),
    "add rows": lambda h: jnp.zeros((9, 8)).at[IDS].add(h),
    "add rows to others": lambda h: h.at[IDS[:3] // 2].add(h[:3]),
    "columns": lambda h: jnp.zeros((8, 9)).at[:, IDS].set(h.T).T,
    "largest of rows": lambda h: jnp.full((9, 8), -jnp.inf).at[IDS].max(h),
    "segment sum": lambda h: jax.ops.segment_sum(h, IDS, 8),
    "segment max": lambda h: jax.ops.segment_max(h, IDS, 8),
    "sort": lambda h: jnp.sort(h, axis=0),
    "top k": lambda h: jax.lax.top_k(h.T, 3)[0].T,
    "average of windows": lambda h: jax.lax.reduce_window(
        h, 0.0, jax.lax.add, (2, 1), (1, 1), "SAME"
    ),
    "maximum of windows": lambda h: nn.max_pool(h[None], (3,), (2,), "SAME")[0],
    "cumulative": lambda h: jnp.cumsum(h, axis=0),
    "transform": lambda h: jnp.fft.fft(h, axis=0).real,
    "where, infinite": lambda h: jnp.where(X > 9, -jnp.inf, h),
    "captured zeros": lambda h: h + np.zeros((1, 8), np.float32),
    "maximum of captured zeros": lambda h: jnp.maximum(h, jnp.zeros((6, 8))),
}


@pytest.mark.parametrize("case", PASSED)
def test_the_norm_absorbs(case):
    def fn(p, x):
        return PASSED[case](x * p["norm"]) @ p["w"]

    [group] = graph_of(fn, PARAMS, X).groups
    assert group.absorbers == ("norm",)
    assert group.size == 8
    # By s in float64, as the labels say: no bit of the program's rules is used here.
    s = 2.0 ** np.random.default_rng(0).integers(-3, 4, 8)
    folded = {"norm": PARAMS["norm"] / s[None], "w": PARAMS["w"] * s[:, None]}
    folded = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), folded)
    np.testing.assert_array_equal(fn(folded, X), fn(PARAMS, X))


#: The same along the channels, which these mix: refused, or all channels share one scale.
MIXED = {
    "sort": lambda h: jnp.sort(h, axis=1),
    "top k": lambda h: jax.lax.top_k(h, 8)[0],
    "windows": lambda h: jax.lax.reduce_window(h, 0.0, jax.lax.add, (1, 2), (1, 1), "SAME"),
    "transform": lambda h: jnp.fft.fft(h, axis=1).real,
    "set columns": lambda h: jnp.zeros((6, 8)).at[:, IDS].set(h[:, :6]),
    "onto ones": lambda h: jnp.ones((9, 8)).at[IDS].set(h),
    "argmax": lambda h: h + jnp.argmax(h, axis=1, keepdims=True).astype(h.dtype),
}


@pytest.mark.parametrize("case", MIXED)
def test_channels_that_are_mixed_have_no_scale_of_their_own(case):
    def fn(p, x):
        return MIXED[case](x * p["norm"]) @ p["w"]

    assert all(group.size == 1 for group in graph_of(fn, PARAMS, X).groups)


@pytest.mark.parametrize("case", [c for c in PASSED if "captured" not in c and "where" not in c])
def test_the_laws_refuse_a_label_in_another_place(case):
    def fn(p, x):
        return PASSED[case](x * p["norm"])

    program = program_of(fn, PARAMS, X)
    [made] = [e for e in program.equations if e.name == "mul" and e.variables[0] in program.roots]
    labels = {made.outputs[0]: -np.arange(1, 9)[None]}
    labels[program.whole["norm"]] = -np.arange(1, 9)[None]
    # Everything after the product stays unlabelled: the first equation there must object.
    assert "does not pass the scale on" in certify(program, labels)
