"""Convolutions as sites: what their channels are, how scales pass them, and the law that checks it."""

import re

import convolutions_in_numpy as oracle
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import sqjax as sq
from sqjax.folding.claims import Claim
from sqjax.folding.find_graph import find_graph
from sqjax.folding.graph import Graph, Kernel, Site
from sqjax.folding.groups import Survey
from sqjax.folding.laws import LAWS
from sqjax.program.facts import Program
from sqjax.program.trace import trace

LAST = ("NHWC", "HWIO", "NHWC")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def conv(x, w, layout=LAST, strides=(1, 1), padding="SAME", groups=1):
    return lax.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=layout, feature_group_count=groups
    )


def graph_of(fn, params, *inputs) -> Graph:
    return find_graph(Survey.of(Program(trace(fn, params, inputs, {})[0]), {}))


# Sites --------------------------------------------------------------------------------------------

X = np.random.default_rng(0).normal(size=(2, 5, 6, 4)).astype(np.float32)
SITES = {
    "plain": (
        lambda p, x: conv(x, p["w"]),
        (3, 3, 4, 5),
        Site("w", (2,), (4,), (), Kernel((0, 1, 2))),
    ),
    "outputs first": (
        lambda p, x: conv(x.transpose(0, 3, 1, 2), p["w"], ("NCHW", "OIHW", "NCHW")),
        (5, 4, 3, 3),
        Site("w", (1,), (4,), (), Kernel((1, 2, 3))),
    ),
    "depthwise": (
        lambda p, x: conv(x, p["w"], groups=4),
        (3, 3, 1, 4),
        Site("w", (3,), (4,), (), Kernel((0, 1, 2))),
    ),
    "depthwise, multiplied": (
        lambda p, x: conv(x, p["w"], groups=4),
        (3, 3, 1, 8),
        Site("w", (2,), (4,), (), Kernel((0, 1, 2), 4, 3)),
    ),
    "groups": (
        lambda p, x: conv(x, p["w"], groups=2),
        (3, 3, 2, 6),
        Site("w", (2,), (4,), (), Kernel((0, 1, 2), 2, 3)),
    ),
    "a dense kernel": (
        lambda p, x: conv(x, p["w"][None, None]),
        (4, 5),
        Site("w", (0,), (4,), (), Kernel((0,))),
    ),
    "depthwise, no axis of inputs": (
        lambda p, x: conv(x, p["w"][:, :, None], groups=4),
        (3, 3, 4),
        Site("w", (2,), (4,), (), Kernel((0, 1))),
    ),
    "one of a stack": (
        lambda p, x: conv(conv(x, p["w"][0]), p["w"][1]),
        (2, 3, 3, 4, 4),
        Site("w", (3,), (2, 4), (0,), Kernel((1, 2, 3))),
    ),
    "scanned": (
        lambda p, x: lax.scan(lambda x, w: (jnp.tanh(conv(x, w)), None), x, p["w"])[0],
        (2, 3, 3, 4, 4),
        Site("w", (3,), (2, 4), (0,), Kernel((1, 2, 3))),
    ),
}


@pytest.mark.parametrize("name", SITES)
def test_the_kernel_of_a_convolution_is_a_site(name):
    fn, shape, expected = SITES[name]
    assert graph_of(fn, {"w": normal(*shape)}, X).sites == (expected,)


REFUSED = {
    "mixed inputs": (
        lambda p, x: conv(x, p["w"].reshape(3, 3, 4, 5)),
        (3, 3, 2, 2, 5),
        r"`conv_general_dilated` at .* is a convolution whose channels, or sums, are parts",
    ),
    "outputs of groups": (
        lambda p, x: conv(x, p["w"].reshape(3, 3, 2, 6), groups=2),
        (3, 3, 2, 2, 3),
        r"is a convolution in groups whose outputs are no whole axis of it: it stays float",
    ),
    "batch groups": (
        lambda p, x: lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=LAST, batch_group_count=2
        ),
        (3, 3, 4, 6),
        r"has a batch_group_count: it stays float",
    ),
    "an image of leaves": (
        lambda p, x: conv(p["w"], x[:, :, :, :, None].reshape(3, 4, 5, 4)),
        (1, 5, 6, 5),
        r"convolves it, but not as a kernel: it stays float",
    ),
    "turned": (
        lambda p, x: conv(x, lax.rev(p["w"], (0, 1))),
        (3, 3, 4, 5),
        r"multiplies what `rev` at .* makes of it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_kernels_stay_float_and_say_why(name):
    fn, shape, reason = REFUSED[name]
    graph = graph_of(fn, {"w": normal(*shape)}, X)
    assert graph.sites == ()
    assert re.search(reason, dict(graph.refused)["w"])


# How scales pass ----------------------------------------------------------------------------------


class Block(nn.Module):
    """Convolutions with everything that stands between them in practice."""

    @nn.compact
    def __call__(self, x):
        def norm(x):
            return nn.BatchNorm(use_running_average=True)(x)

        x = nn.relu(norm(nn.Conv(4, (3, 3), use_bias=False, name="stem")(x)))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.pooling.pool(x, 0.0, lax.add, (2, 2), (1, 1), "SAME")
        x = nn.relu(nn.Conv(4, (3, 3), feature_group_count=4, name="depthwise")(x))
        x = nn.relu(nn.Conv(6, (1, 1), name="pointwise")(x))
        x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=3, name="groups")(x))
        return nn.Dense(3, name="head")(x.reshape(x.shape[0], -1))


def block():
    module, x = Block(), normal(2, 8, 8, 3, seed=1)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    params = jax.tree.map(lambda a: a + 0.1 * normal(*a.shape), variables["params"])

    def fn(params, x):
        return module.apply({**variables, "params": params}, x)

    return fn, params, x


@pytest.mark.slow
def test_scales_fold_through_a_block():
    """BatchNorm, depthwise, pointwise, grouped: each absorbs for the next; calibration proves it."""
    fn, params, x = block()
    stats = sq.calibrate(fn, params, [x])
    found = {group.name: (group.size, group.absorbers) for group in stats.graph.groups}
    assert found == {
        "depthwise/kernel": (4, ("BatchNorm_0/bias", "BatchNorm_0/scale")),
        "pointwise/kernel": (4, ("depthwise/bias", "depthwise/kernel")),
        "groups/kernel": (6, ("pointwise/bias", "pointwise/kernel")),
        # The head reads every position: those of a channel share its scale.
        "head/kernel": (6, ("groups/bias", "groups/kernel")),
    }
    smoothed = sq.smooth(params, stats, 0.5)
    assert sq.verify(fn, params, smoothed, x) < 1e-6
    again = sq.calibrate(fn, smoothed, [x])
    derived = sq.fold_stats(stats, sq.scales(params, stats, 0.5))
    for path, absmax in derived.absmax.items():
        np.testing.assert_allclose(again.absmax[path], absmax, rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_statistics_are_those_of_input_channels():
    fn, params, x = block()
    stats = sq.calibrate(fn, params, [x, -2 * x])
    expected = np.abs(np.asarray(x)).max((0, 1, 2)) * 2
    np.testing.assert_array_equal(stats.absmax["stem/kernel"], expected)
    assert stats.count["stem/kernel"] == 2 * 2 * 8 * 8
    assert stats.absmax["groups/kernel"].shape == (6,)
    # Channels 2 and 3 are read by the second group's outputs, 2 and 3.
    kernel = np.abs(np.asarray(params["groups"]["kernel"]))
    by_group = [kernel[:, :, i % 2, i // 2 * 2 : i // 2 * 2 + 2].max() for i in range(6)]
    np.testing.assert_array_equal(stats.weight_absmax["groups/kernel"], by_group)


# The law ------------------------------------------------------------------------------------------


def claims(groups, inputs, outputs):
    """A convolution's equation, and the shapes of its labels."""
    x, w = np.zeros((2, 3, groups * inputs)), np.zeros((2, inputs, groups * outputs))

    def fn(p, x):
        return lax.conv_general_dilated(
            x,
            p["w"],
            (1,),
            "VALID",
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=groups,
        )

    program = Program(trace(fn, {"w": w}, (x,), {})[0])
    [equation] = [e for e in program.equations if e.name == "conv_general_dilated"]
    return program, equation


def truth(groups, x, w, y, of_x, of_w, of_y):
    """Whether the numbers say so: with scales 2, 4, 8 ... the result changes as its labels claim."""
    scale = 2.0 ** np.arange(1, 9)

    def scaled(a, labels):
        factor = np.where(labels > 0, scale[labels - 1], 1) / np.where(
            labels < 0, scale[-labels - 1], 1
        )
        return a * factor

    def run(x, w):
        return oracle.convolve(x, w, (1,), ((0, 0),), (1,), (1,), groups)

    return np.allclose(run(scaled(x, of_x), scaled(w, of_w)), scaled(y, of_y), rtol=1e-12)


def test_the_law_says_what_numbers_say():
    """Right labels of every kind, and the same with one label changed anywhere."""
    rng = np.random.default_rng(0)
    seen = {True: 0, False: 0}
    for groups, inputs, outputs in ((1, 3, 2), (3, 1, 1), (3, 1, 2), (2, 2, 2)):
        program, equation = claims(groups, inputs, outputs)
        x = rng.normal(size=(2, 3, groups * inputs))
        w = rng.normal(size=(2, inputs, groups * outputs))
        y = oracle.convolve(x, w, (1,), ((0, 0),), (1,), (1,), groups)
        channels = 1 + np.arange(groups * inputs)
        met = np.repeat(channels.reshape(groups, 1, inputs), outputs, 1).reshape(-1, inputs).T
        of_outputs = 1 + np.arange(groups * outputs)
        tied = np.repeat(1 + np.arange(groups), outputs)
        zeros = np.zeros
        right = [
            (-channels[None, None], met[None], zeros((1, 1, 1), int)),
            (zeros((1, 1, 1), int), -of_outputs[None, None], -of_outputs[None, None]),
            (
                -np.array([1, 2])[:, None, None],
                zeros((1, 1, 1), int),
                -np.array([1, 2])[:, None, None],
            ),
            (
                -np.repeat(1 + np.arange(groups), inputs)[None, None],
                zeros((1, 1, 1), int),
                -tied[None, None],
            ),
        ]
        for labels in right:
            full = [np.broadcast_to(a, b.shape) for a, b in zip(labels, (x, w, y), strict=True)]
            wrong = []
            for which in range(3):
                changed = [a.copy() for a in full]
                place = tuple(rng.integers(0, n) for n in changed[which].shape)
                changed[which][place] = rng.choice([-4, 0, 4])
                wrong.append(changed)
            for case in (labels, full, *wrong):
                claim = Claim(program, equation, [*case[:2]], [case[2]])
                whole = [np.broadcast_to(a, b.shape) for a, b in zip(case, (x, w, y), strict=True)]
                expected = truth(groups, x, w, y, *whole)
                assert LAWS["conv_general_dilated"](claim) == expected, (groups, case)
                seen[expected] += 1
    assert min(seen.values()) > 20


def test_a_fold_through_a_leaky_window_is_refused():
    """A pooling that begins at something else than -inf, or mixes channels, passes no scale."""
    params = {"gain": normal(4), "w": normal(1, 1, 4, 5)}

    def over_channels(p, x):
        h = lax.reduce_window(
            x * p["gain"][None, None, None], -np.inf, lax.max, (1, 1, 1, 2), (1,) * 4, "SAME"
        )
        return conv(h, p["w"])

    [group] = graph_of(over_channels, params, X).groups
    assert group.size == 1  # neighbours meet, so all channels share one scale

    def floored(p, x):
        h = lax.reduce_window(
            x * p["gain"][None, None, None], 0.5, lax.max, (1, 2, 2, 1), (1,) * 4, "SAME"
        )
        return conv(h, p["w"])

    graph = graph_of(floored, params, X)
    assert graph.groups == ()
    assert "reduce_window" in dict(graph.refused)["w"]
