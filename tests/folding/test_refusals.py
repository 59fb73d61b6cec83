"""Programs that must be refused, by the search and by the certificate alone; odd programs; a budget."""

import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from traced import graph_of, normal, program_of

import sqjax as sq
from sqjax.folding import moves
from sqjax.folding import search as closure
from sqjax.folding.certificate import certify
from sqjax.folding.find_graph import find_graph
from sqjax.folding.graph import Group, LabelMap
from sqjax.folding.groups import Survey
from sqjax.folding.per_step import Stack
from sqjax.folding.sites import find_sites
from sqjax.models import LlamaConfig, Model
from sqjax.program.equations import Var

LLAMA = LlamaConfig(
    vocab_size=31,
    hidden_size=12,
    intermediate_size=10,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
)


# Programs that must be refused --------------------------------------------------------------------


class Unlawful(NamedTuple):
    """fn, its arguments, the refused site, what the reason says, and the labels that a careless
    search would give.

    `labels`: {leaf (or "input of <site>"): labels}; the rest follows by `carelessly`.
    """

    fn: Any
    params: Any
    args: tuple
    site: str
    reason: str
    labels: dict


CHANNELS = np.arange(1, 5)
ROWS, COLUMNS = CHANNELS[:, None], CHANNELS[None, :]
AB = {"a": normal(4, 4), "b": normal(4, 4, seed=1)}
NB = {"n": normal(4), "b": normal(4, 4)}
CONSTANT = np.asarray(normal(3, 4, seed=2))
X = normal(3, 4)
COLUMNS_THEN_ROWS = {"a": -COLUMNS, "b": ROWS}
GAIN_THEN_ROWS = {"n": -CHANNELS, "b": ROWS}
HERE = r".*test_refusals\.py:\d+"


def unscaled_batch_norm(p, x):
    h = jax.nn.relu(x @ p["a"])
    return (h - h.mean(0, keepdims=True)) * lax.rsqrt(jnp.var(h, 0, keepdims=True) + 1e-5) @ p["b"]


def mixed_up(p, x):
    """u times its own channels in another order: each reader alone looks harmless."""
    u = x @ p["a"]
    return u * u.reshape(3, 2, 2).swapaxes(1, 2).reshape(3, 4) @ p["b"]


UNLAWFUL = {
    "cube": Unlawful(
        lambda p, x: (x @ p["a"]) ** 3 @ p["b"],
        AB,
        (X,),
        "b",
        rf"`integer_pow` at {HERE}",
        COLUMNS_THEN_ROWS,
    ),
    "u * u * u": Unlawful(
        lambda p, x: (u := x @ p["a"]) * u * u @ p["b"],
        AB,
        (X,),
        "b",
        rf"`mul` at {HERE}",
        COLUMNS_THEN_ROWS,
    ),
    "u / u": Unlawful(
        lambda p, x: (u := x @ p["a"]) / u @ p["b"],
        AB,
        (X,),
        "b",
        rf"`div` at {HERE}",
        COLUMNS_THEN_ROWS,
    ),
    "1 / u": Unlawful(
        lambda p, x: 1 / (x @ p["a"]) @ p["b"],
        AB,
        (X,),
        "b",
        rf"1.*`div` at {HERE}",
        COLUMNS_THEN_ROWS,
    ),
    "u * reshape(u)": Unlawful(mixed_up, AB, (X,), "b", rf"`mul` at {HERE}", COLUMNS_THEN_ROWS),
    "a bound other than 0": Unlawful(
        lambda p, x: jnp.maximum(x @ p["a"], 1.0) @ p["b"],
        AB,
        (X,),
        "b",
        r"constant 1\.0",
        COLUMNS_THEN_ROWS,
    ),
    "a threshold other than 0": Unlawful(
        lambda p, x: jnp.where((u := x @ p["a"]) > 0.5, u, 0.0) @ p["b"],
        AB,
        (X,),
        "b",
        rf"`gt` at {HERE}.*compares it",
        COLUMNS_THEN_ROWS,
    ),
    "softmax": Unlawful(
        lambda p, x: jax.nn.softmax(x @ p["a"]) @ p["b"],
        AB,
        (X,),
        "b",
        r"`(exp|reduce_max)` at",
        COLUMNS_THEN_ROWS,
    ),
    "activation function": Unlawful(
        lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"],
        AB,
        (X,),
        "b",
        rf"`tanh` at {HERE}.*stands in",
        COLUMNS_THEN_ROWS,
    ),
    "residual reads the norm": Unlawful(
        lambda p, x: (h := x * p["n"][None]) @ p["b"] + h,
        NB,
        (X,),
        "b",
        "an output of fn",
        GAIN_THEN_ROWS,
    ),
    "fn returns the norm": Unlawful(
        lambda p, x: ((h := x * p["n"][None]) @ p["b"], h),
        NB,
        (X,),
        "b",
        "an output of fn",
        GAIN_THEN_ROWS,
    ),
    "fn returns the leaf": Unlawful(
        lambda p, x: ((x * p["n"][None]) @ p["b"], p["n"]),
        NB,
        (X,),
        "b",
        "an output of fn",
        GAIN_THEN_ROWS,
    ),
    "kernel used twice": Unlawful(
        lambda p, x: jax.nn.relu(x @ p["b"]) @ p["b"],
        {"b": AB["a"]},
        (X,),
        "b",
        "input 0 of fn",
        {"b": -COLUMNS},
    ),
    "kernel used twice, its rows": Unlawful(
        lambda p, x: jax.nn.relu((x * p["n"][None]) @ p["b"]) @ p["b"],
        {"n": NB["n"], "b": AB["a"]},
        (X,),
        "b",
        rf"`dot_general` at {HERE}",
        GAIN_THEN_ROWS,
    ),
    "slices of one leaf overlap": Unlawful(
        lambda p, x: (x * p["n"][None]) @ p["b"][:4] + x @ p["b"][2:],
        {"n": NB["n"], "b": normal(6, 4)},
        (X,),
        "b",
        rf"`dot_general` at {HERE}.*`slice` at {HERE}",
        {"n": -CHANNELS, "b": np.array([[1, 2, 3, 4, 0, 0]]).T},
    ),
    "batch statistics": Unlawful(
        unscaled_batch_norm, AB, (X,), "b", "`square` at|`mul` at", COLUMNS_THEN_ROWS
    ),
    "a constant is added": Unlawful(
        lambda p, x: (x * p["n"][None] + CONSTANT) @ p["b"],
        NB,
        (X,),
        "b",
        "a constant captured by fn",
        GAIN_THEN_ROWS,
    ),
    "ones are added": Unlawful(
        lambda p, x: (x * p["n"][None] + jnp.ones(4)[None]) @ p["b"],
        NB,
        (X,),
        "b",
        r"constant 1\.0",
        GAIN_THEN_ROWS,
    ),
    "a constant is the activation": Unlawful(
        lambda p, x: x + jnp.asarray(CONSTANT) @ p["b"],
        {"b": AB["b"]},
        (X,),
        "b",
        "a constant captured by fn",
        {"input of b": -COLUMNS, "b": ROWS},
    ),
    "the input is the activation": Unlawful(
        lambda p, x: x @ p["b"],
        {"b": AB["b"]},
        (X,),
        "b",
        "input 0 of fn",
        {"input of b": -COLUMNS, "b": ROWS},
    ),
    "integer input": Unlawful(
        lambda p, x: x.astype(jnp.float32) @ p["b"],
        {"b": AB["b"]},
        (jnp.arange(12).reshape(3, 4),),
        "b",
        rf"input 0 of fn.*`convert_element_type` at {HERE}",
        {"input of b": -COLUMNS, "b": ROWS},
    ),
    "integers in between": Unlawful(
        lambda p, x: (x * p["n"][None]).astype(jnp.int32).astype(jnp.float32) @ p["b"],
        NB,
        (X,),
        "b",
        rf"dtype int32.*`convert_element_type` at {HERE}",
        {"input of b": -COLUMNS, "b": ROWS},
    ),
    "float8 in between": Unlawful(
        lambda p, x: (x * p["n"][None]).astype(jnp.float8_e4m3fn).astype(jnp.float32) @ p["b"],
        NB,
        (X,),
        "b",
        "float8_e4m3fn",
        GAIN_THEN_ROWS,
    ),
    "channels are added up": Unlawful(
        lambda p, x: (h := x * p["n"][None]) @ p["b"] + h.sum(-1, keepdims=True),
        NB,
        (X,),
        "b",
        rf"`reduce_sum` at {HERE}.*adds up its channels",
        GAIN_THEN_ROWS,
    ),
}


def carelessly(program, labels):
    """Labels of every variable: forwards through anything, whoever else reads it, the first
    operand's label winning.

    This is what a search would give that asks of each reader alone whether it could cope.
    """
    named = {path: var for var, path in program.leaves.items()}
    named |= {f"input of {p.site.path}": p.activation for p in find_sites(program)[0]}
    carried = {named[name]: array for name, array in labels.items()}
    for equation in program.equations:
        operands = [v for v in equation.inputs if isinstance(v, Var) and v in carried]
        if not operands or equation.outputs[0] in carried:
            continue
        x, y = operands[0], equation.outputs[0]
        old, new = program.shape(x), program.shape(y)
        if equation.name in moves.MOVES:
            carried[y] = moves.MOVES[equation.name](carried[x], equation.params, old, new)
        elif equation.name == "dot_general":
            columns = carried.get(equation.inputs[1], np.zeros((2, 1)))
            if columns.shape[0] == 1:  # else they are a site's rows, where the scale ends
                carried[y] = columns
        elif len(old) == len(new) and program.is_float(y):
            carried[y] = carried[x]
        elif equation.name == "reduce_sum":
            carried[y] = (
                carried[x].squeeze(equation.params["axes"])
                if carried[x].shape[-1] == 1
                else np.array(0)
            )
    return {var: array for var, array in carried.items() if array.any()}


@pytest.mark.parametrize("name", UNLAWFUL)
def test_refused_with_a_reason(name):
    case = UNLAWFUL[name]
    graph = graph_of(case.fn, case.params, *case.args)
    grouped = {path for g in graph.groups for path, _ in g.sites}
    assert case.site not in grouped
    assert re.search(case.reason, dict(graph.refused)[case.site])


@pytest.mark.parametrize("name", UNLAWFUL)
def test_the_certificate_alone_refuses(name):
    case = UNLAWFUL[name]
    program = program_of(case.fn, case.params, *case.args)
    problem = certify(program, carelessly(program, case.labels))
    assert isinstance(problem, str)
    assert "`" in problem or "fn" in problem or "dtype" in problem


#: Those whose labels are on leaves alone: an input, a constant or an integer is not changed there.
OF_LEAVES = [name for name, case in UNLAWFUL.items() if case.labels.keys() <= case.params.keys()]


@pytest.mark.parametrize("name", OF_LEAVES)
def test_the_field_alone_refuses(name):
    case = UNLAWFUL[name]
    labels = [(path, LabelMap.of(np.asarray(x))) for path, x in case.labels.items()]
    graph = graph_of(case.fn, case.params, *case.args)
    size = max(int(abs(x.array).max()) for _, x in labels)
    group = Group(case.site, size, (), tuple(labels), norm=False)
    proof = sq.prove(case.fn, case.params, graph._replace(groups=(group,)), *case.args)
    assert not proof.holds


@pytest.mark.parametrize(
    ("fn", "params", "labels"),
    [
        (lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], AB, COLUMNS_THEN_ROWS),
        (lambda p, x: (x * p["n"][None]) @ p["b"], NB, GAIN_THEN_ROWS),
        (
            lambda p, x: 2.0 * (x * p["n"][None]).reshape(3, 4, 1).squeeze(2) @ p["b"],
            NB,
            GAIN_THEN_ROWS,
        ),
    ],
)
def test_the_certificate_passes_what_is_lawful(fn, params, labels):
    """So that the refusals above mean something; and one wrong label in the lawful ones is
    refused.
    """
    program = program_of(fn, params, X)
    carried = carelessly(program, labels)
    assert certify(program, carried) is None
    assert certify(program, {}) is None
    for var, array in carried.items():
        others = {v: a for v, a in carried.items() if v != var}
        assert certify(program, others), "a label forgotten"
        assert certify(program, {**others, var: -array}), "multiplied in place of divided"
        swapped = np.sign(array) * np.array([0, 2, 1, 3, 4])[np.abs(array)]
        assert certify(program, {**others, var: swapped}), "two channels swapped"
        assert "shape" in certify(program, {**others, var: np.resize(array, [7] * array.ndim)})
        assert "rank" in certify(program, {**others, var: array[None]})


def test_the_certificate_counts_no_label_twice():
    """u * u with every channel tied carries s^2; that is not the scale of channel 1 + 1."""
    program = program_of(lambda p, x: (u := x @ p["a"]) * u @ p["b"], AB, X)
    carried = carelessly(program, {"a": -(COLUMNS**0), "b": 2 * ROWS**0})
    (product,) = (e for e in program.equations if e.name == "mul")
    carried[product.outputs[0]] = np.array([[-2]])
    assert "`mul` at" in certify(program, carried)


def test_the_certificate_refuses_channels_that_a_site_reads_in_another_order():
    params = {"gain": normal(4), "a": normal(4, 5), "b": normal(4, 5)}

    def fn(p, x):
        h = x * p["gain"][None]
        return h.T.reshape(3, 4) @ p["a"] + h @ p["b"]

    program = program_of(fn, params, X)
    assert "`dot_general`" in certify(
        program, carelessly(program, {"gain": -CHANNELS, "a": ROWS, "b": ROWS})
    )
    assert (
        certify(program, carelessly(program, {"gain": -(CHANNELS**0), "a": ROWS**0, "b": ROWS**0}))
        is None
    )


def test_one_array_at_two_places_is_refused():
    n, b = NB["n"], NB["b"]
    fn = lambda p, x: (x * p["n"][None]) @ p["b"] + x @ p["c"]
    assert len(graph_of(fn, {"n": n, "b": b, "c": b + 0}, X).groups) == 1
    graph = graph_of(fn, {"n": n, "b": b, "c": b}, X)
    assert not graph.groups
    assert "the array at b also stands at c" in dict(graph.refused)["b"]


def test_two_leaves_of_one_path_are_refused():
    """Or one's scale would go into the other."""
    params = {"n/g": NB["n"], "n": {"g": NB["n"] + 1}, "b": NB["b"]}
    with pytest.raises(ValueError, match=r"one path, \['n/g'\]"):
        graph_of(lambda p, x: (x * p["n"]["g"][None]) @ p["b"] + x * p["n/g"][None], params, X)


def test_a_tied_embedding_is_refused():
    model = Model(LLAMA.__class__(**{**vars(LLAMA), "tie_embeddings": True, "num_layers": 1}))
    params = jax.eval_shape(model.init, jax.random.key(0))
    graph = graph_of(model.apply, params, jnp.array([[1, 2]]))
    reason = dict(graph.refused)["model/embed_tokens/embedding"]
    assert re.search(
        r"`mul` at \S*norms.py.* multiplies two values of that scale", reason
    )  # the residual's norm
    assert len(graph.groups) == 4


# Odd programs: a Refused is no crash, and says why ------------------------------------------------


ORDER = jnp.array([3, 0, 1, 1])


def loop(p, x):
    return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x * p["n"][None], p["w"])[0] @ p["b"]


ODD = {
    "scan": (loop, {**NB, "w": normal(2, 4, 4)}, r"`scan` at .*stands in the way"),
    "while": (
        lambda p, x: (
            lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1 + p["n"][None], x) @ p["b"]
        ),
        NB,
        r"`while` at .*stands in the way",
    ),
    "cond": (
        lambda p, x: lax.cond(x.sum() > 0, lambda y: y * p["n"][None], lambda y: y, x) @ p["b"],
        NB,
        r"`cond` at .*stands in the way",
    ),
    "convolution": (
        lambda p, x: (
            lax.conv((x * p["n"][None])[None, None], p["k"], (1, 1), "SAME")[0, 0] @ p["b"]
        ),
        {**NB, "k": normal(1, 1, 3, 3)},
        "1 of 4 channels  k            b",
    ),
    "sort": (
        lambda p, x: jnp.sort(x * p["n"][None], -1) @ p["b"],
        NB,
        "1 of 4 channels  n            b",
    ),
    "gather of channels": (
        lambda p, x: (x * p["n"][None])[:, ORDER] @ p["b"],
        NB,
        "1 of 4 channels  n            b",
    ),
    "gather of channels, beside them": (
        lambda p, x: ((h := x * p["n"][None]) @ p["b"], h[:, ORDER].sum()),
        NB,
        "refused b: `gather` at .*does not take its channels whole",
    ),
    "gather of rows": (
        lambda p, x: (x * p["n"][None])[ORDER % 3] @ p["b"],
        NB,
        "       4  n            b",
    ),
    "scatter": (
        lambda p, x: (x * p["n"][None]).at[0].add(1.0) @ p["b"],
        NB,
        "refused b: the constant 1.0 would have to be rescaled",
    ),
    "callback": (
        lambda p, x: (jax.debug.print("{}", p["n"][0]), (x * p["n"][None]) @ p["b"])[1],
        NB,
        "`debug_(print|callback)` at",
    ),
    "leaf with batch axes": (
        lambda p, x: jnp.einsum("bi,bij->bj", x, p["w"]),
        {"w": normal(3, 4, 5)},
        "(?s)1 sites.*refused w: its scale would reach input 0 of fn",
    ),
    "leaf with batch axes, and a gain": (
        lambda p, x: jnp.einsum("bi,bij->bj", x * p["n"], p["w"]),
        {"n": normal(3, 4), "w": normal(3, 4, 5)},
        r"(?s)1 sites\n.*\n      12  n            w",
    ),
    "integer leaf": (
        lambda p, x: x.astype(jnp.int32) @ p["i"],
        {"i": jnp.ones((4, 5), jnp.int32)},
        "refused i: `dot_general` at .*int32",
    ),
    "complex leaf": (
        lambda p, x: (x.astype(jnp.complex64) @ p["c"]).real,
        {"c": jnp.ones((4, 5), jnp.complex64)},
        "refused c: `dot_general` at .*complex64",
    ),
    "a slice of a leaf": (
        lambda p, x: (x * p["n"][None]) @ p["w"][:4],
        {"n": NB["n"], "w": normal(8, 4)},
        "refused w: `dot_general` at .*`slice` at",
    ),
    "a leaf reshaped": (
        lambda p, x: x @ p["w"].reshape(4, 4),
        {"w": normal(16)},
        "refused w: `dot_general` at .*`reshape` at",
    ),
    "two leaves added": (
        lambda p, x: x @ (p["v"] + p["w"]),
        {"v": normal(4, 5), "w": normal(4, 5)},
        "refused v: `dot_general` at .*`add` at .* makes of v, w together: they stay "
        r"float\. Compute this matrix once, before calibrating, and pass it in params",
    ),
    "two leaves multiplied": (
        lambda p, x: x @ (p["a"] @ p["b"]),
        AB,
        "refused b: `dot_general` at .* makes of a, b together: they stay float",
    ),
    "a weight normed": (
        lambda p, x: x @ (p["w"] / jnp.sqrt((p["w"] ** 2).sum(0))[None] * p["g"][None]),
        {"w": normal(4, 5), "g": normal(5)},
        r"refused w: .* multiplies w as fn has scaled it by its own norm, which a smoothing scale",
    ),
    "joined along the channels": (
        lambda p, x: jnp.concatenate([x, x], 1) @ jnp.concatenate([p["v"], p["w"]]),
        {"v": normal(4, 5), "w": normal(4, 5)},
        "refused v: .*`concatenate` at .* makes of v, w together: they stay float",
    ),
    "stacked in fn": (
        lambda p, x: jnp.einsum("td,edf->etf", x, jnp.stack([p["v"], p["w"]])),
        {"v": normal(4, 5), "w": normal(4, 5)},
        "refused v: .* makes of v, w together: they stay float",
    ),
    "reversed": (
        lambda p, x: jax.lax.scan(lambda h, w: (h @ w, None), x, p["w"][::-1])[0],
        {"w": normal(2, 4, 4)},
        r"refused w: .*`rev` at .* makes of it: it stays float\. Compute that once",
    ),
    "picked by a loop's counter": (
        lambda p, x: jax.lax.fori_loop(0, 2, lambda i, h: h @ p["w"][i], x),
        {"w": normal(2, 4, 4)},
        "refused w: .*picks of it by an index: it stays float; .* use jax.lax.scan",
    ),
    "contracted along different axes": (
        lambda p, x: (
            jnp.einsum("td,dhk->thk", x, p["b"]),
            jnp.einsum("tk,dhk->tdh", x[:, :2], p["b"]),
        ),
        {"b": normal(4, 2, 2)},
        "refused b: it is contracted along different axes, and `dot_general` at .* does not sum "
        "over just what are outputs elsewhere: it stays float, unless that reads a leaf of its own",
    ),
    "multiplied as w and as w.T": (
        lambda p, x: jnp.tanh(x @ p["b"]) @ p["b"].T,
        {"b": AB["b"]},
        "(?s)1 sites\n.*refused b: `tanh` at .*at run time",
    ),
    "a site in no group": (
        lambda p, x: jnp.tanh(x) @ p["b"],
        {"b": AB["b"]},
        r"(?s)refused b: `tanh` at .*at run time: .*smoothing=0\.5.*runtime=0\.5",
    ),
    "zeros are the activation": (
        lambda p, x: jnp.tanh(jnp.zeros((3, 4)) @ p["h"] + x @ p["b"]),
        {"h": AB["a"], "b": AB["b"]},
        "refused h: it holds only zeros",
    ),
    "no channels": (
        lambda p, x: x[:, :0] * p["n"][None] @ p["b"],
        {"n": normal(0), "b": normal(0, 5)},
        "refused b: it has no channels",
    ),
    "no tokens": (
        lambda p, x: (
            (x[:0] * p["n"][None]).reshape(0).sum() + ((x[:0] * p["n"][None]) @ p["b"]).sum()
        ),
        NB,
        "1 sites",
    ),
    "a literal is split": (
        lambda p, x: (
            (x * p["n"][None]) @ p["b"]
            + jnp.concatenate(jnp.split(np.ones((3, 4), np.float32), 2, 1), 1)
        ),
        NB,
        "n            b",
    ),
    "no leaves at all": (lambda p, x: x, {}, "0 groups, 0 sites"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_programs(name):
    fn, params, expected = ODD[name]
    assert re.search(expected, str(graph_of(fn, params, X)))


@pytest.mark.slow
def test_a_search_that_would_branch_for_ever_gives_up(monkeypatch):
    """Twenty free choices, then one that can not be met: without a budget, 2^20 tries."""
    params = {f"{n}{i}": normal(4, 4, seed=i) for i in range(20) for n in "ab"} | {
        "w": normal(4, 4)
    }

    def fn(p, x):
        y = jax.nn.relu(jnp.exp(x)) * jax.nn.relu(jnp.exp(-x))
        for i in range(20):
            y = (x @ p[f"a{i}"]) * (x @ p[f"b{i}"]) + y
        return y @ p["w"]

    def other_order(p, x):
        y = jnp.zeros_like(x)
        for i in range(20):
            y = y + (x @ p[f"a{i}"]) * (x @ p[f"b{i}"])
        return (jax.nn.relu(jnp.exp(x)) * jax.nn.relu(jnp.exp(-x)) + y) @ p["w"]

    monkeypatch.setattr(closure, "BUDGET", 2000)
    for f in (fn, other_order):
        reason = dict(graph_of(f, params, X).refused)["w"]
        assert "`exp` at" in reason or "gave up" in reason
        assert len(reason) < 2000


@pytest.mark.slow
def test_the_search_is_linear_in_the_layers(monkeypatch):
    """A 16-layer Llama of realistic widths, by shapes alone: its time, and how often labels are
    spread over a site.
    """
    spread, of_site = [], Stack.of_site
    monkeypatch.setattr(Stack, "of_site", lambda *args: spread.append(args) or of_site(*args))

    def cost(layers):
        config = LlamaConfig(32000, 4096, 14336, layers, 32, 8, 128)
        model = Model(config)
        params = jax.eval_shape(model.init, jax.random.key(0))
        program = program_of(model.apply, params, jnp.zeros((1, 16), jnp.int32))
        spread.clear()
        start = time.process_time()
        graph = find_graph(Survey.of(program, {}))
        assert len(graph.groups) == 4 * layers + 1
        assert not graph.refused
        return time.process_time() - start, len(spread)

    (short, few), (long, many) = cost(4), cost(16)
    assert long < 15  # seconds
    assert long < 10 * short  # 4 if linear, 16 if quadratic; a noisy clock
    assert 0 < many < 5 * few


def solve(p, x):
    return lax.custom_linear_solve(
        lambda y: y @ p["inner"], x @ p["b"], lambda product, y: product(y), symmetric=True
    )


def convolution(p, x):
    return lax.conv((x @ p["b"])[None, None], p["inner"][None, None], (1, 1), "SAME")[0, 0]


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (solve, rf"`custom_linear_solve` at {HERE}.*\(solve\) reads it, and is not looked into"),
        (convolution, rf"`conv_general_dilated` at {HERE}.*\(convolution\) is a convolution whose"),
    ],
)
def test_leaves_that_are_read_where_no_site_can_be_are_reported_with_the_line(fn, reason):
    params = {"b": AB["a"], "inner": AB["b"]}
    stats = sq.calibrate(fn, params, [X])
    assert [site.path for site in stats.graph.sites] == ["b"]
    assert re.search(reason, dict(stats.graph.refused)["inner"])
    with pytest.raises(ValueError, match=rf"(?s)no matmul.*inner: {reason}"):
        sq.calibrate(lambda p, x: fn({"b": AB["a"], **p}, x), {"inner": params["inner"]}, [X])
