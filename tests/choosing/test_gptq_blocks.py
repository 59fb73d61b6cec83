"""gptq_blocks beside gptq of the whole model, by the outputs of layers in sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sqjax as sq
from sqjax.numerics.gptq import corrected_weight

WIDTH, LAYERS = 16, 4
W4 = sq.Scheme(weight=sq.Int4(group_size=8, zero_point=True), activation=None)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def block(params, x):
    heads = jnp.einsum("ti,ihd->thd", x, params["up"])
    return x + jnp.einsum("thd,hdo->to", jnp.tanh(heads), params["down"])


def layers():
    return [
        {"up": draw(i, WIDTH, 2, 8) / 4, "down": draw(10 + i, 2, 8, WIDTH) / 4}
        for i in range(LAYERS)
    ]


def whole(params, x):
    for layer in params:
        x = block(layer, x)
    return x


def inputs(seed):
    return draw(seed, 300, WIDTH) @ draw(99, WIDTH, WIDTH) / 3


def loss(qlayers, seed):
    x = inputs(seed)
    exact = whole(layers(), x)
    return float(jnp.square(sq.quantized(whole)(qlayers, x) - exact).sum())


def test_a_corrected_weight_is_the_least_squares_solution():
    x, noise, w = inputs(1), draw(2, 300, WIDTH) / 5, draw(3, 5, WIDTH)
    y = x + noise
    found = corrected_weight(w, y.T @ y, y.T @ x, 0.0)
    expected, *_ = np.linalg.lstsq(np.asarray(y, float), np.asarray(x @ w.T, float), rcond=None)
    np.testing.assert_allclose(found, expected.T, atol=1e-4)
    same = corrected_weight(w, x.T @ x, x.T @ x)
    np.testing.assert_allclose(same, w, atol=1e-6)


def test_layers_make_up_for_those_before():
    batches = [inputs(1), inputs(2)]
    stats = sq.calibrate(whole, layers(), batches, gram=True)
    alone = sq.gptq(layers(), stats, W4)
    found = sq.gptq_blocks(block, layers(), batches, W4, clip=False)
    assert loss(found, 3) < 0.9 * loss(alone, 3)
    assert jax.tree.structure(found) == jax.tree.structure(alone)
    again = sq.gptq_blocks(block, layers(), batches, W4, clip=False)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, again))


def test_rules_leave_a_site_float():
    found = sq.gptq_blocks(block, layers(), [inputs(1)], {"up": W4, ".*": None})
    assert isinstance(found[1]["up"], sq.QuantWeight)
    np.testing.assert_array_equal(found[1]["down"], layers()[1]["down"])


def test_what_is_refused():
    with pytest.raises(ValueError, match="expected a scheme without static scales"):
        sq.gptq_blocks(block, layers(), [inputs(1)], sq.W8A8_O3)
    with pytest.raises(ValueError, match="expected an iterable of batches, got one"):
        sq.gptq_blocks(block, layers(), inputs(1), W4)
    stacked = lambda params, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[
        0
    ]
    params = [{"w": draw(5, 3, WIDTH, WIDTH)}]
    with pytest.raises(ValueError, match="w: expected one matrix outside of loops, got one in a"):
        sq.gptq_blocks(stacked, params, [inputs(1)], W4)


def convolved(params, x):
    kernel = params["kernel"]
    return (
        jnp.tanh(
            jax.lax.conv_general_dilated(
                x[None], kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            )[0]
        )
        @ params["w"]
    )


def looked_up(params, x):
    return x @ params["w"] + params["table"][jnp.argmax(x, axis=-1)]


def twice(params, x):
    return x + jnp.tanh(x @ params["w"]) @ params["w"]


@pytest.mark.parametrize(
    ("fn", "rules", "text"),
    [
        (twice, W4, "w: expected a weight .* got one that is multiplied with several"),
        (convolved, W4, "kernel: expected a weight .* got a convolution's kernel"),
        (looked_up, {"w": W4, "table": sq.EMBEDDING_INT8}, "table: expected .* embedding table"),
    ],
)
def test_a_leaf_that_would_be_worse_or_stay_float_is_refused(fn, rules, text):
    square = draw(5, WIDTH, WIDTH)
    leaves = {"w": square, "kernel": draw(6, 3, WIDTH, WIDTH), "table": square + 1}
    names = {twice: ["w"], convolved: ["kernel", "w"], looked_up: ["w", "table"]}[fn]
    with pytest.raises(ValueError, match=text):
        sq.gptq_blocks(fn, [{name: leaves[name] for name in names}], [inputs(1)], rules)


@pytest.mark.parametrize("number", [jnp.nan, 1e30])
def test_a_later_batch_of_nan_or_overflow_is_named(number):
    batches = [inputs(1), inputs(2).at[3, 4].set(number)]
    with pytest.raises(ValueError, match=r"layers\[0\], up: expected finite activations"):
        sq.gptq_blocks(block, layers(), batches, W4, clip=False)


def of_layers(made):
    return {"layers": made, "batches": [inputs(1)]}


MADE = layers()
WRONG = {
    "no layers": (of_layers([]), "layers: expected a list .* got none"),
    "a stack": (of_layers(jax.tree.map(lambda *x: jnp.stack(x), *MADE)), "layers: .* got dict"),
    "an iterator": (of_layers(iter(MADE)), "layers: expected a list of parameter trees"),
    "paths": (of_layers([MADE[0], {"up": MADE[1]["up"]}]), r"layers\[1\]: expected leaves of"),
    "shapes": (of_layers([MADE[0], {**MADE[1], "up": MADE[1]["down"]}]), r"layers\[1\]: expected"),
    "tuples": ({"layers": MADE, "batches": [(inputs(1), 3)]}, "batch 0: expected one array"),
}


@pytest.mark.parametrize(("arguments", "text"), [*WRONG.values()], ids=[*WRONG])
def test_wrong_arguments_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        sq.gptq_blocks(block, scheme=W4, **arguments)
