"""`learn`: the simulation beside the quantized model, its gradients beside numpy, the laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from slow import slow_but

import sqjax as sq
from sqjax.choosing.batches import checksum, kind_of
from sqjax.choosing.divergence import divergence
from sqjax.choosing.simulation import round_activation, round_with_zero_point, simulated
from sqjax.methods.quantization import site_schemes
from sqjax.numerics.formats import INT8
from sqjax.program.trace import trace

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.float32(RNG.normal(size=shape))


#: Channels of x that differ by a factor of 30, as those of language models do.
BATCHES = [normal(64, 16) * jnp.float32(np.geomspace(0.3, 10, 16))[None] for _ in range(4)]
#: Both matrices have one shape, so that their programs are compiled once.
PARAMS = {"g": 1 + normal(1, 16) ** 2, "up": normal(16, 16), "down": normal(16, 16)}
STATIC = {".*": "W8A8_O3"}


def net(p, x):
    return jnp.maximum((x * p["g"]) @ p["up"], 0) @ p["down"]


@functools.cache
def calibrated():
    return sq.calibrate(net, PARAMS, BATCHES)


def learned(**options):
    options = {"loss": "mse", "steps": 4, "every": 2, **options}
    batches = options.pop("batches", BATCHES)
    return sq.learn(net, PARAMS, calibrated(), batches, options.pop("rules", STATIC), **options)


def lost(found, rules=STATIC):
    """The real quantized model's mean square error."""
    qparams = sq.quantize(*found.applied(PARAMS, calibrated()), rules, clips=found.clips)
    errors = [sq.quantized(net)(qparams, x) - net(PARAMS, x) for x in BATCHES]
    return float(np.mean(np.square(errors)))


G8 = sq.Int4(group_size=8, zero_point=True)
SCHEMES = {
    "static": sq.W8A8_O3,
    "per tensor": sq.W8A8_O2,
    "per token": sq.W8A8,
    "weights": sq.Scheme(weight=G8, activation=None),
    "two levels": sq.Scheme(
        weight=sq.Int4(group_size=8, zero_point=True, two_level=True), activation=sq.PerToken()
    ),
    "float8": sq.FP8,
    "zero points": sq.W4A4.replace(
        weight=G8, activation=sq.PerToken(format="int4", zero_point=True)
    ),
}


@pytest.mark.parametrize("scheme", slow_but(SCHEMES, "static"))
def test_the_simulation_has_the_values_of_the_quantized_model(scheme):
    s = sq.scales(PARAMS, calibrated(), 0.5)
    clips = {"up": jnp.full((16, 2 if "Int4" in repr(scheme) else 1), 0.8, jnp.float32)}
    is_static = scheme == sq.W8A8_O3
    measured = sq.fold_stats(calibrated(), s)
    limit = 0.7 * jnp.max(measured.absmax["down"])
    numbers = {"s": s, "clips": clips, "ranges": {"down": limit} if is_static else {}}
    x = BATCHES[0]
    traced, inputs = trace(net, PARAMS, (x,), {})
    schemes = site_schemes(calibrated().graph, scheme)
    got = jax.jit(lambda n: simulated(traced, PARAMS, calibrated(), schemes, n, inputs))(numbers)

    if is_static:
        measured.absmax["down"] *= 0.7
    qparams = sq.quantize(sq.fold(PARAMS, calibrated().graph, s), measured, scheme, clips=clips)
    wanted = sq.quantized(net)(qparams, x)
    assert np.abs(wanted - net(PARAMS, x)).max() > 1e-3 * np.abs(wanted).max()
    # A code that lies between two integers may round to the other one.
    np.testing.assert_allclose(got, wanted, atol=4e-3 * np.abs(wanted).max())
    assert np.mean(np.square(got - wanted)) < 1e-3 * np.mean(np.square(wanted - net(PARAMS, x)))


def experts(p, x):
    return jnp.einsum("tec,ecf->tef", x, p["w"])


def layers(p, x):
    step = lambda x, w: (jnp.tanh(jnp.einsum("tec,cd->ted", x, w)), None)
    return jax.lax.scan(step, x, p["w"])[0]


@pytest.mark.parametrize("fn", slow_but([layers, experts], experts))
def test_matrices_of_a_stack_have_their_own_scales(fn):
    params = {"w": normal(3, 20, 20)}
    x = normal(9, 3, 20) * jnp.float32([1, 5, 25]).reshape(1, 3, 1)
    stats = sq.calibrate(fn, params, [x])
    traced, inputs = trace(fn, params, (x,), {})
    ranges = {"w": jnp.max(stats.absmax["w"], axis=1)}
    learned = {"s": {}, "clips": {}, "ranges": ranges}
    for scheme in (sq.W8A8_O3, sq.Scheme(weight=sq.Int4(group_size=8), activation=None)):
        schemes = site_schemes(stats.graph, scheme)
        numbers = learned if scheme == sq.W8A8_O3 else {**learned, "ranges": {}}
        got = simulated(traced, params, stats, schemes, numbers, inputs)
        wanted = sq.quantized(fn)(sq.quantize(params, stats, scheme), x)
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=5e-3)
        assert np.abs(wanted - fn(params, x)).max() > 0.02


def test_rounding_has_the_gradients_of_lsq():
    """Inside the range dx + (round(q) - q) dscale; beyond it round(q) dscale."""
    x, scale = jnp.float32([0.26, -0.31, 20.0, -20.0]), jnp.float32(0.1)
    values, pull = jax.vjp(lambda x, scale: round_activation(x, scale[None], INT8), x, scale)
    np.testing.assert_allclose(values, [0.3, -0.3, 12.7, -12.7], rtol=1e-6)
    wanted = [3 - 2.6, -3 + 3.1, 127, -127]
    for place, of_scale in enumerate(wanted):
        of_x, got = pull(jnp.eye(4, dtype=jnp.float32)[place])
        assert float(got) == pytest.approx(of_scale, abs=1e-4)
        assert of_x.tolist() == [float(i == place < 2) for i in range(4)]


def test_rounding_with_a_zero_point_has_the_gradients_of_lsq():
    """dx + (round(q) - q) dscale, with scale = (max - min) / 15 = 0.2."""
    x = jnp.float32([[-1.0, 0.26, 2.0]])
    values, pull = jax.vjp(lambda x: round_with_zero_point(x, (1,)), x)
    np.testing.assert_allclose(values, [[-1.0, 0.2, 2.0]], rtol=1e-6)
    of_scale = (1 - 1.3) / 15
    [got] = pull(jnp.float32([[0, 1, 0]]))
    np.testing.assert_allclose(got, [[-of_scale, 1.0, of_scale]], atol=1e-6)


def test_it_learns_what_smoothing_is_for():
    found = learned(steps=60, every=10, optimizer=optax.adam(0.05))
    start = learned(steps=0)
    assert lost(found) < 0.6 * lost(start)
    assert found.losses.best < 0.6 * found.losses.held_out[0]
    # And the float function is what it was.
    folded, _ = found.applied(PARAMS, calibrated())
    x = BATCHES[0]
    np.testing.assert_allclose(net(folded, x), net(PARAMS, x), rtol=1e-4, atol=1e-3)
    assert not np.allclose(folded["up"], PARAMS["up"], rtol=0.1)
    assert set(found.ranges) == {"up", "down"}
    assert found.clips == {}


@pytest.mark.slow
def test_clips_are_learned_too():
    rules = {".*": sq.Scheme(weight=sq.Int4(), activation=None)}
    options = {"rules": rules, "steps": 60, "every": 10, "optimizer": optax.adam(0.02)}
    found = learned(clips=True, **options)
    assert lost(found, rules) < 0.9 * lost(learned(rules=rules, steps=0), rules)
    clips = np.concatenate([np.ravel(x) for x in found.clips.values()])
    assert clips.min() < 0.95
    assert clips.max() <= 1


def test_it_is_never_worse_than_its_start_and_the_identity():
    wild = learned(optimizer=optax.sgd(1e6))
    assert wild.losses.best == wild.losses.held_out[0] == learned(steps=0).losses.best
    assert all((s == 1).all() for s in wild.s.values())
    # From a bad start the identity is better.
    bad = {name: jnp.geomspace(1e-3, 1e3, s.size) for name, s in wild.s.items()}
    found = learned(s=bad, steps=0)
    assert found.losses.best == wild.losses.best < found.losses.held_out[0]
    assert all((s == 1).all() for s in found.s.values())


def test_a_saved_state_goes_on_with_the_same_bits(tmp_path):
    whole = learned(clips=True)
    half = learned(clips=True, steps=2)
    sq.save(tmp_path / "state.safetensors", half.state)
    rest = learned(clips=True, state=sq.load(tmp_path / "state.safetensors"))
    for one, other in ((whole, rest), (whole, learned(clips=True, batches=BATCHES[::-1]))):
        same = jax.tree.map(np.array_equal, one.state, other.state)
        assert all(jax.tree.leaves(same))
        assert one.losses.best == other.losses.best
    assert not np.array_equal(half.losses.train, whole.losses.train)


def test_a_state_of_another_loss_or_other_rules_is_refused():
    state = learned(steps=2).state
    for others in ({"loss": "kl"}, {"rules": sq.W8A8_O3.replace(weight=G8)}):
        with pytest.raises(ValueError, match="the best of the state has a loss of"):
            learned(state=state, **others)
    moved = state["arrays"] | {"best": {"t": state["arrays"]["best"]}}
    with pytest.raises(ValueError, match="state is of other arguments"):
        learned(state=state | {"arrays": moved})
    for name in state:
        with pytest.raises(ValueError, match="expected the state of an earlier call"):
            learned(state={field: x for field, x in state.items() if field != name})


def test_a_logit_that_is_masked_has_no_part_in_the_divergence():
    wanted, got = normal(5, 4), normal(5, 4)
    masked = [x.at[:, 2].set(-jnp.inf) for x in (wanted, got)]
    kept = jnp.array([0, 1, 3])

    def of_kept(got):
        return divergence(got[:, kept], wanted[:, kept])

    loss, slopes = jax.value_and_grad(divergence)(masked[1], masked[0])
    expected, expected_slopes = jax.value_and_grad(of_kept)(got)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(slopes, expected_slopes, atol=1e-6)


def test_it_stops_when_nothing_gets_better():
    found = learned(steps=100, every=1, patience=3, optimizer=optax.sgd(0.0))
    assert len(found.losses.train) == 3
    assert len(found.losses.held_out) == 4


def test_one_program_for_all_batches():
    traced = []

    def counted(p, x):
        traced.append(1)
        return net(p, x)

    sq.learn(counted, PARAMS, calibrated(), BATCHES, STATIC, loss="mse", steps=4, every=2)
    assert len(traced) == 1


def loss_with_batch(got, wanted, x):
    return jnp.mean(jnp.square(got - wanted)) * jnp.mean(x**2)


def test_a_loss_of_ones_own():
    found = learned(loss=loss_with_batch, steps=1)
    assert found.losses.train[0] > 0


WRONG = {
    "no batches": ({"batches": []}, "batches is empty"),
    "nothing quantized": ({"rules": {".*": None}}, "quantize a matmul"),
    "at run time": ({"rules": sq.W8A8.replace(smoothing=0.5)}, "without smoothing or rotation"),
    "rotated": ({"rules": sq.W4A4_ROTATED}, "without smoothing or rotation"),
    "loss": ({"loss": "l1"}, "'kl', 'mse' or a function"),
    "group": ({"s": {"u": jnp.ones(16)}}, "no group is named 'u'"),
    "clips of 0": ({"clips": {"up": jnp.zeros((16, 1))}}, "clips of 'up': expected factors in"),
    "shape of clips": ({"clips": {"up": jnp.ones((3, 1))}}, "up: clips: expected factors of the"),
    "site of clips": ({"clips": {"g": jnp.ones((16, 1))}}, "'g' is no matmul's weight"),
    "steps": ({"steps": -1}, "learn: steps: expected a number of 0 or more, got -1"),
    "every": ({"every": 0}, "learn: every: expected a number of 1 or more, got 0"),
    "patience": ({"patience": 0}, "learn: patience: expected a number of 1 or more, or None"),
    "state": ({"state": {}}, "state of an earlier call"),
    "other state": (
        {"state": {"arrays": {}, "best_loss": 1.0, "train": [], "held_out": [1.0]}},
        "state is of other arguments",
    ),
}


@pytest.mark.parametrize(("options", "text"), [*WRONG.values()], ids=[*WRONG])
def test_wrong_arguments_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        learned(**options)


def test_batches_may_hold_random_keys():
    """Another key is another batch of one kind, and the same key the same one."""
    x = np.ones(3, np.float32)
    args = [(x, jax.random.key(seed)) for seed in (0, 1, 0)]
    first, other, again = map(checksum, args)
    assert first == again != other
    assert kind_of(args[0]) == kind_of(args[1]) != kind_of((x, jax.random.PRNGKey(0)))
