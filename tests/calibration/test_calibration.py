"""`calibrate`: several functions of one tree, and masks for padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import sqjax as sq

WIDTH = 4


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


PARAMS = {
    "gain": 2 + normal(WIDTH),
    "a": normal(WIDTH, 5),
    "b": normal(WIDTH, 3),
    "head": normal(5, 2),
}
X, Y = normal(5, WIDTH), 3 * normal(2, WIDTH, seed=1)


def encode(p, x):
    return jnp.maximum((x * p["gain"][None]) @ p["a"], 0) @ p["head"]


def decode(p, x):
    return (x * p["gain"][None]) @ p["b"]


def groups(stats):
    return {
        (g.size, tuple(sorted(g.absorbers)), tuple(sorted(p for p, _ in g.sites)))
        for g in stats.graph.groups
    }


# Several functions ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_functions_that_share_a_leaf_share_its_group():
    stats = sq.calibrate([encode, decode], PARAMS, [[X], [Y]])
    assert groups(stats) == {(WIDTH, ("gain",), ("a", "b")), (5, ("a",), ("head",))}
    alone = [sq.calibrate(fn, PARAMS, [batch]) for fn, batch in ((encode, X), (decode, Y))]
    for path, one in (("a", alone[0]), ("head", alone[0]), ("b", alone[1])):
        for name in ("absmax", "abs_sum", "count", "weight_absmax"):
            np.testing.assert_array_equal(getattr(stats, name)[path], getattr(one, name)[path])
    x_max = np.maximum(
        np.abs(X * PARAMS["gain"][None]).max(0), np.abs(Y * PARAMS["gain"][None]).max(0)
    )
    w_max = np.maximum(np.abs(PARAMS["a"]).max(1), np.abs(PARAMS["b"]).max(1))
    np.testing.assert_allclose(sq.scales(PARAMS, stats)["a"], np.sqrt(x_max / w_max), rtol=1e-5)
    assert not np.allclose(sq.scales(PARAMS, alone[0])["a"], np.sqrt(x_max / w_max), rtol=1e-3)


@pytest.mark.slow
def test_what_folds_in_one_function_alone_is_not_folded():
    """The second one reads the norm's output, or its gain, for something else."""
    for other in (
        lambda p, x: (decode(p, x), x * p["gain"][None]),
        lambda p, x: decode(p, x) * p["gain"].sum(),
    ):
        stats = sq.calibrate([encode, other], PARAMS, [[X], [Y]])
        assert groups(stats) == {(5, ("a",), ("head",))}  # not that of `gain`
        assert {site.path for site in stats.graph.sites} == {"a", "b", "head"}
        assert {"a", "b"} <= set(dict(stats.graph.refused))
        assert (WIDTH, ("gain",), ("a",)) in groups(sq.calibrate(encode, PARAMS, [X]))


@pytest.mark.slow
def test_smoothing_leaves_every_function_as_it_was():
    stats = sq.calibrate([encode, decode], PARAMS, [[X], [Y]])
    exact = sq.smooth(PARAMS, stats, round_scales="pow2")
    assert not np.array_equal(exact["gain"], PARAMS["gain"])
    for fn, x in ((encode, X), (decode, Y)):
        run = jax.jit(fn)
        np.testing.assert_array_equal(run(exact, x), run(PARAMS, x))
    qparams = sq.quantize(exact, stats)
    for fn, x in ((encode, X), (decode, Y)):
        error = (
            np.abs(jax.jit(sq.quantized(fn))(qparams, x) - fn(PARAMS, x)).max()
            / np.abs(fn(PARAMS, x)).max()
        )
        assert 1e-4 < error < 0.05


@pytest.mark.slow
def test_a_site_of_both_functions_sees_both():
    stats = sq.calibrate(
        [decode, lambda p, x, scale: scale * decode(p, x)],
        PARAMS,
        [[X, 2 * X], [(Y, jnp.ones(()))]],
    )
    seen = np.abs(np.concatenate([X, 2 * X, Y]) * PARAMS["gain"][None])
    np.testing.assert_allclose(stats.absmax["b"], seen.max(0), rtol=1e-6)
    np.testing.assert_allclose(stats.abs_sum["b"], seen.sum(0), rtol=1e-5)
    assert int(stats.count["b"]) == 12


@pytest.mark.slow
def test_one_function_in_a_list_is_that_function():
    jax.tree.map(
        np.testing.assert_array_equal,
        sq.calibrate([encode], PARAMS, [[X, Y]]),
        sq.calibrate(encode, PARAMS, [X, Y]),
    )


@pytest.mark.slow
def test_generators_are_read_once():
    stats = sq.calibrate((encode, decode), PARAMS, (iter([X, X]), (y for y in [Y, Y, Y])))
    assert (int(stats.count["a"]), int(stats.count["b"])) == (10, 6)


def test_functions_and_batches_must_be_as_many():
    with pytest.raises(ValueError, match="2 functions, but 1 iterables of batches"):
        sq.calibrate([encode, decode], PARAMS, [[X]])
    with pytest.raises(ValueError, match="batches is empty"):
        sq.calibrate([encode, decode], PARAMS, [[X], []])


@pytest.mark.slow
def test_every_batch_of_a_function_must_have_its_sites():
    """A site that only the other function has is not missed."""

    def sometimes(p, x):
        return decode(p, x) if len(x) == 2 else x

    assert int(sq.calibrate([encode, sometimes], PARAMS, [[X], [Y]]).count["b"]) == 2
    with pytest.raises(
        ValueError,
        match="calibration batch 1: b was in the first batch's program, not in this one's",
    ):
        sq.calibrate([encode, sometimes], PARAMS, [[X], [Y, X]])


# Masks ----------------------------------------------------------------------------------------------------------------

IDS_MASK = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
TOKENS = np.array(normal(3, 3, WIDTH))
PADDED = jnp.asarray(np.where(IDS_MASK[..., None], TOKENS, 1e6))


def of_mask(x, mask):
    return mask


def check_against_real_tokens(stats, path, activation):
    """`activation`: of the real tokens only, (tokens, channels)."""
    np.testing.assert_allclose(stats.absmax[path], np.abs(activation).max(0), rtol=1e-5)
    np.testing.assert_allclose(stats.abs_sum[path], np.abs(activation).sum(0), rtol=1e-5)
    assert int(stats.count[path]) == len(activation) == IDS_MASK.sum()


NORMED = TOKENS[IDS_MASK] * np.asarray(PARAMS["gain"])
MASKED = {  # what reads (batch, tokens, channels) and a mask, and one site of it
    "tokens by token": lambda p, x, mask: (x * p["gain"]) @ p["a"],
    "tokens in a row": lambda p, x, mask: (x * p["gain"]).reshape(9, WIDTH) @ p["a"],
    "channels first": lambda p, x, mask: p["a"].T @ (x * p["gain"]).reshape(9, WIDTH).T,
    "a mask that is used": lambda p, x, mask: (
        ((x * p["gain"]) @ p["a"]) * mask[..., None].astype(jnp.float32)
    ),
    "one of several heads": lambda p, x, mask: jnp.einsum(
        "bthd,hdo->bto", (x * p["gain"]).reshape(3, 3, 2, 2), p["a"].reshape(2, 2, 5)
    ),
}


@pytest.fixture(scope="module")
def padded():
    """(statistics with a mask, without): one function of all layouts, each with a weight of its own."""

    def fn(p, x, mask):
        return [layout({**p, "a": p[name]}, x, mask) for name, layout in MASKED.items()]

    params = {"gain": PARAMS["gain"]} | {name: PARAMS["a"] + 0 for name in MASKED}
    batches = [(PADDED, jnp.asarray(IDS_MASK))]
    with jax.numpy_rank_promotion("allow"):
        return sq.calibrate(fn, params, batches, mask=of_mask), sq.calibrate(fn, params, batches)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.slow
def test_padding_does_not_count(padded, name):
    masked, unmasked = padded
    check_against_real_tokens(masked, name, NORMED)
    assert int(unmasked.count[name]) == 9
    assert unmasked.absmax[name].min() > 1e5


@pytest.mark.slow
def test_masks_of_several_batches_and_shapes():
    fn = MASKED["tokens by token"]
    batches = [(PADDED, jnp.asarray(IDS_MASK)), (PADDED[:1, :2], jnp.array([[True, False]]))]
    with jax.numpy_rank_promotion("allow"):
        stats = sq.calibrate(fn, PARAMS, batches, mask=of_mask)
    seen = np.concatenate([NORMED, TOKENS[0, :1] * np.asarray(PARAMS["gain"])])
    np.testing.assert_allclose(stats.abs_sum["a"], np.abs(seen).sum(0), rtol=1e-5)
    assert int(stats.count["a"]) == len(seen)


@pytest.mark.slow
def test_a_mask_may_be_computed_from_the_batch():
    """From token ids, say; integers count as booleans."""
    fn = lambda p, ids: (p["table"][ids] * p["gain"][None, None]) @ p["a"]
    table = normal(7, WIDTH).at[0].set(1e6)
    ids = jnp.array([[3, 1, 0], [6, 0, 0]])
    stats = sq.calibrate(
        fn, {**PARAMS, "table": table}, [ids], mask=lambda ids: (ids != 0).astype(jnp.int32)
    )
    seen = np.abs(np.asarray(table)[[3, 1, 6]] * np.asarray(PARAMS["gain"]))
    np.testing.assert_allclose(stats.absmax["a"], seen.max(0), rtol=1e-6)
    assert int(stats.count["a"]) == 3


@pytest.mark.slow
def test_an_activation_without_tokens_counts_whole():
    """A pooled one: (batch, channels)."""

    def fn(p, x, mask):
        h = x * p["gain"]
        return h @ p["a"], h.sum(1) @ p["b"]

    with jax.numpy_rank_promotion("allow"):
        stats = sq.calibrate(
            fn, PARAMS, [(jnp.asarray(TOKENS), jnp.asarray(IDS_MASK))], mask=of_mask
        )
    check_against_real_tokens(stats, "a", NORMED)
    pooled = (TOKENS * np.asarray(PARAMS["gain"])).sum(1)
    np.testing.assert_allclose(stats.absmax["b"], np.abs(pooled).max(0), rtol=1e-5)
    assert int(stats.count["b"]) == 3


@pytest.mark.slow
def test_masks_reach_into_scans():
    stack = {"gain": 2 + normal(2, WIDTH), "w": normal(2, WIDTH, WIDTH)}

    def fn(p, x, mask):
        step = lambda x, q: (jnp.tanh((x * q["gain"]) @ q["w"]), None)
        return lax.scan(step, x, p)[0]

    with jax.numpy_rank_promotion("allow"):
        stats = sq.calibrate(fn, stack, [(PADDED, jnp.asarray(IDS_MASK))], mask=of_mask)
    x = TOKENS[IDS_MASK]
    for layer in range(2):
        h = x * np.asarray(stack["gain"][layer])
        np.testing.assert_allclose(stats.absmax["w"][layer], np.abs(h).max(0), rtol=1e-5)
        np.testing.assert_allclose(stats.abs_sum["w"][layer], np.abs(h).sum(0), rtol=1e-5)
        x = np.tanh(h @ np.asarray(stack["w"][layer]))
    assert int(stats.count["w"]) == IDS_MASK.sum()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.slow
def test_masks_of_tokens_that_experts_share(flat):
    """Experts that see every token are masked alike; their statistics stay apart."""

    def fn(p, x, mask):
        h = x * p["gain"]
        h = h.reshape(9, WIDTH) if flat else h
        own = jnp.stack([h, 2 * h])
        return jnp.einsum("e...d,edf->e...f", own, p["w"]), h @ p["a"]

    params = {**PARAMS, "w": normal(2, WIDTH, 3)}
    with jax.numpy_rank_promotion("allow"):
        stats = sq.calibrate(fn, params, [(PADDED, jnp.asarray(IDS_MASK))], mask=of_mask)
    check_against_real_tokens(stats, "a", NORMED)
    np.testing.assert_allclose(
        stats.absmax["w"], [np.abs(k * NORMED).max(0) for k in (1, 2)], rtol=1e-5
    )
    assert int(stats.count["w"]) == IDS_MASK.sum()


def test_a_mask_of_nothing_but_padding_leaves_every_channel_dead():
    fn = lambda p, x, mask: x @ p["a"]
    with pytest.warns(UserWarning, match="no token reached a; "):
        stats = sq.calibrate(fn, PARAMS, [(PADDED, jnp.zeros((3, 3), bool))], mask=of_mask)
    assert int(stats.count["a"]) == 0
    np.testing.assert_array_equal(stats.absmax["a"], np.zeros(WIDTH))


def test_several_functions_share_a_mask():
    fn = lambda p, x, mask: (x * p["gain"][None, None]) @ p["b"]
    batch = PADDED, jnp.asarray(IDS_MASK)
    stats = sq.calibrate(
        [fn, lambda p, x, mask: 2 * fn(p, x, mask)], PARAMS, [[batch], [batch]], mask=of_mask
    )
    assert int(stats.count["b"]) == 2 * IDS_MASK.sum()
    np.testing.assert_allclose(stats.absmax["b"], np.abs(NORMED).max(0), rtol=1e-5)


@pytest.mark.slow
def test_static_scales_of_a_masked_calibration_ignore_padding():
    fn = lambda p, x, mask: (x * p["gain"][None, None]) @ p["b"]
    stats = sq.calibrate(fn, PARAMS, [(PADDED, jnp.asarray(IDS_MASK))], mask=of_mask)
    qparams = sq.quantize(PARAMS, stats, sq.W8A8_O3)
    np.testing.assert_allclose(
        qparams["b"].input_scale, np.abs(NORMED).max() / np.float32(127), rtol=1e-6
    )
    real = jnp.asarray(np.where(IDS_MASK[..., None], TOKENS, 0))
    got, expected = jax.jit(sq.quantized(fn))(qparams, real, IDS_MASK), fn(PARAMS, real, IDS_MASK)
    assert 1e-4 < np.abs(got - expected).max() / np.abs(expected).max() < 0.03
