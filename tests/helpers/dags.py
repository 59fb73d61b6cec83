"""Small programs as data, with two interpreters: NumPy in float64, and a JAX function to trace.

The two share nothing but the nodes, so that NumPy can say whether a change of the parameters
changes the program.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from convolutions_in_numpy import convolve
from jax import lax


class Node(NamedTuple):
    """One operation on earlier nodes (by their number)."""

    op: str
    operands: tuple[int, ...] = ()
    params: Any = None


class Dag(NamedTuple):
    """Nodes in order, those that are returned, and the values of the leaves (by name) and of the
    inputs.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]
    leaves: dict[str, np.ndarray]
    inputs: tuple[np.ndarray, ...]

    def __str__(self) -> str:
        def shown(x):
            if isinstance(x, Dag):
                return "{" + str(x).replace("\n", "; ") + "}"
            return f"array{list(x.shape)}" if isinstance(x, np.ndarray) and x.size > 8 else repr(x)

        lines = [
            f"{k} = {n.op}{list(n.operands)} {shown_params(n.params, shown)}"
            for k, n in enumerate(self.nodes)
        ]
        shapes = {name: leaf.shape for name, leaf in self.leaves.items()}
        return "\n".join([*lines, f"return {list(self.outputs)}", f"leaves {shapes}"])


def shown_params(params: Any, shown: Callable[[Any], str]) -> str:
    if isinstance(params, tuple) and not hasattr(params, "nodes"):
        return f"({', '.join(map(shown, params))})"
    return "" if params is None else shown(params)


class Step(NamedTuple):
    """What an interpreter did: an operation, its operands' values, its result, the operation's
    parameters.
    """

    op: str
    operands: tuple[Any, ...]
    result: Any
    params: Any


def _einsum(dims, a, b):
    (ac, bc), (ab, bb) = dims
    names_a, names_b = list(range(a.ndim)), [100 + k for k in range(b.ndim)]
    for p, q in [*zip(ac, bc, strict=True), *zip(ab, bb, strict=True)]:
        names_b[q] = names_a[p]
    free_a = [n for k, n in enumerate(names_a) if k not in (*ac, *ab)]
    free_b = [n for k, n in enumerate(names_b) if k not in (*bc, *bb)]
    number = {n: k for k, n in enumerate(dict.fromkeys([*names_a, *names_b]))}
    out = [*(names_a[k] for k in ab), *free_a, *free_b]
    return np.einsum(
        a, [number[n] for n in names_a], b, [number[n] for n in names_b], [number[n] for n in out]
    )


def _broadcast(params, x):
    shape, axes = params
    full = [1] * len(shape)
    for axis, size in zip(axes, x.shape, strict=True):
        full[axis] = size
    return np.broadcast_to(x.reshape(full), shape).copy()


def _pad(params, x):
    """Zeros before, after and between the elements of every axis."""
    y = np.zeros(
        [
            lo + hi + n + max(n - 1, 0) * mid
            for n, (lo, hi, mid) in zip(x.shape, params, strict=True)
        ]
    )
    cuts = [
        slice(lo, lo + max(n - 1, 0) * (mid + 1) + 1, mid + 1)
        for n, (lo, _, mid) in zip(x.shape, params, strict=True)
    ]
    y[tuple(cuts)] = x
    return y


def _starts(x, sizes, ids):
    """Where a dynamic slice begins: at ids[0] along its first axis that is cut, at 0 along the
    others.
    """
    cut = next(a for a, (n, m) in enumerate(zip(x.shape, sizes, strict=True)) if n != m)
    return [ids[0] if a == cut else ids[0] * 0 for a in range(len(sizes))]


def _dynamic_slice(sizes, x, ids):
    return x[
        tuple(slice(int(s), int(s) + n) for s, n in zip(_starts(x, sizes, ids), sizes, strict=True))
    ]


def _update(shape, x, ids):
    y = np.zeros(shape)
    y[
        tuple(
            slice(int(s), int(s) + n)
            for s, n in zip(_starts(y, x.shape, ids), x.shape, strict=True)
        )
    ] = x
    return y


def _lax_update(shape, x, ids):
    y = lax.full(shape, 0, x.dtype)
    return lax.dynamic_update_slice(y, x, _starts(y, x.shape, ids))


def _bfloat16(_, x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def _cuts(params):
    return tuple(slice(*cut) for cut in zip(*params, strict=True))


def _cumulative(numpy_op):
    def run(params, x):
        axis, reverse = params
        return (
            np.flip(numpy_op(np.flip(x, axis), axis=axis), axis)
            if reverse
            else numpy_op(x, axis=axis)
        )

    return run


def _conv(params, x, w):
    """A convolution in any layout: to channels last, and back."""
    (of_x, of_w, of_y), strides, padding, groups = params
    images = x.transpose(of_x[0], *of_x[2:], of_x[1])
    kernel = w.transpose(*of_w[2:], of_w[1], of_w[0])
    ones = (1,) * len(strides)
    y = convolve(images, kernel, strides, padding, ones, ones, groups)
    return np.moveaxis(y, range(y.ndim), (of_y[0], *of_y[2:], of_y[1])).copy()


def _lax_conv(params, x, w):
    specs, strides, padding, groups = params
    numbers = lax.ConvDimensionNumbers(*specs)
    return lax.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=numbers, feature_group_count=groups
    )


def _pool(params, x):
    """Maxima or sums under a window; the padding is -inf or 0."""
    how, sizes, strides, padding = params
    wide = np.pad(x, padding, constant_values=-np.inf if how == "max" else 0.0)
    windows = np.lib.stride_tricks.sliding_window_view(wide, sizes)
    kept = windows[tuple(slice(None, None, stride) for stride in strides)]
    return getattr(kept, how)(tuple(range(x.ndim, 2 * x.ndim)))


def _lax_pool(params, x):
    how, *where = params
    start, by = (-jnp.inf, lax.max) if how == "max" else (0.0, lax.add)
    return lax.reduce_window(x, np.asarray(start, x.dtype), by, *where)


#: Every operation in NumPy and in JAX, called as f(params, *operands).
OPERATIONS: dict[str, tuple[Callable, Callable]] = {
    "neg": (lambda _, x: -x, lambda _, x: lax.neg(x)),
    "abs": (lambda _, x: np.abs(x), lambda _, x: lax.abs(x)),
    "sign": (lambda _, x: np.sign(x), lambda _, x: lax.sign(x)),
    "square": (lambda _, x: x * x, lambda _, x: lax.square(x)),
    "power": (lambda n, x: x**n, lambda n, x: lax.integer_pow(x, n)),
    "tanh": (lambda _, x: np.tanh(x), lambda _, x: lax.tanh(x)),
    "exp": (lambda _, x: np.exp(x), lambda _, x: lax.exp(x)),
    "logistic": (lambda _, x: 1 / (1 + np.exp(-x)), lambda _, x: lax.logistic(x)),
    "rsqrt": (lambda _, x: 1 / np.sqrt(x), lambda _, x: lax.rsqrt(x)),
    "relu": (lambda _, x: np.maximum(x, 0), lambda _, x: jax.nn.relu(x)),
    "clamp": (lambda b, x: np.clip(x, *b), lambda b, x: lax.clamp(b[0], x, b[1])),
    "add": (lambda _, x, y: x + y, lambda _, x, y: lax.add(x, y)),
    "sub": (lambda _, x, y: x - y, lambda _, x, y: lax.sub(x, y)),
    "mul": (lambda _, x, y: x * y, lambda _, x, y: lax.mul(x, y)),
    "div": (lambda _, x, y: x / y, lambda _, x, y: lax.div(x, y)),
    "max": (lambda _, x, y: np.maximum(x, y), lambda _, x, y: lax.max(x, y)),
    "min": (lambda _, x, y: np.minimum(x, y), lambda _, x, y: lax.min(x, y)),
    "gt": (lambda _, x, y: x > y, lambda _, x, y: lax.gt(x, y)),
    "ge": (lambda _, x, y: x >= y, lambda _, x, y: lax.ge(x, y)),
    "lt": (lambda _, x, y: x < y, lambda _, x, y: lax.lt(x, y)),
    "le": (lambda _, x, y: x <= y, lambda _, x, y: lax.le(x, y)),
    "ne": (lambda _, x, y: x != y, lambda _, x, y: lax.ne(x, y)),
    "where": (lambda _, c, x, y: np.where(c, x, y), lambda _, c, x, y: lax.select(c, x, y)),
    "zeros": (
        lambda shape: np.zeros(shape),
        lambda shape: lax.full(shape, 0.0, jnp.zeros(()).dtype),
    ),
    "transpose": (lambda p, x: x.transpose(p).copy(), lambda p, x: lax.transpose(x, p)),
    "reshape": (lambda s, x: x.reshape(s), lambda s, x: lax.reshape(x, s)),
    "squeeze": (lambda a, x: x.squeeze(a), lambda a, x: lax.squeeze(x, a)),
    "expand": (lambda a, x: np.expand_dims(x, a), lambda a, x: lax.expand_dims(x, a)),
    "broadcast": (_broadcast, lambda p, x: lax.broadcast_in_dim(x, *p)),
    "slice": (lambda p, x: x[_cuts(p)].copy(), lambda p, x: lax.slice(x, *p)),
    "split": (
        lambda p, x: tuple(np.split(x, np.cumsum(p[0])[:-1], p[1])),
        lambda p, x: lax.split(x, *p),
    ),
    "item": (lambda k, pieces: pieces[k], lambda k, pieces: pieces[k]),
    "concatenate": (lambda a, *xs: np.concatenate(xs, a), lambda a, *xs: lax.concatenate(xs, a)),
    "rev": (lambda a, x: np.flip(x, a).copy(), lambda a, x: lax.rev(x, a)),
    "pad": (_pad, lambda p, x: lax.pad(x, jnp.zeros((), x.dtype), p)),
    "cumsum": (_cumulative(np.cumsum), lambda p, x: lax.cumsum(x, *p)),
    "cummax": (_cumulative(np.maximum.accumulate), lambda p, x: lax.cummax(x, *p)),
    "sort": (lambda a, x: np.sort(x, a), lambda a, x: lax.sort(x, dimension=a)),
    "sum": (lambda a, x: x.sum(a), lambda a, x: jnp.sum(x, a)),
    "reduce_max": (lambda a, x: x.max(a), lambda a, x: jnp.max(x, a)),
    "reduce_min": (lambda a, x: x.min(a), lambda a, x: jnp.min(x, a)),
    "dot": (_einsum, lambda d, x, y: lax.dot_general(x, y, d)),
    "conv": (_conv, _lax_conv),
    "pool": (_pool, _lax_pool),
    "gather": (
        lambda a, x, ids: np.take(x, ids, a),
        lambda a, x, ids: jnp.take(x, ids, a, mode="clip"),
    ),
    "gather, filled": (lambda a, x, ids: np.take(x, ids, a), lambda a, x, ids: jnp.take(x, ids, a)),
    "dynamic_slice": (
        _dynamic_slice,
        lambda n, x, ids: lax.dynamic_slice(x, _starts(x, n, ids), n),
    ),
    "dynamic_update_slice": (_update, _lax_update),
    "barrier": (lambda _, x: x, lambda _, x: lax.optimization_barrier(x)),
    "cond": (
        lambda _, x, ids: 2 * x if ids[0] > 0 else -x,
        lambda _, x, ids: lax.cond(ids[0] > 0, lambda x: x + x, lax.neg, x),
    ),
    "loop": (lambda _, x: -x, lambda _, x: lax.fori_loop(0, 3, lambda _, x: -x, x)),
    "bfloat16": (_bfloat16, lambda _, x: x.astype(jnp.bfloat16).astype(x.dtype)),
}
WRAPPERS = {"jit": jax.jit, "remat": jax.checkpoint}


def evaluate(dag: Dag, leaves: Mapping[str, Any], inputs: Sequence[Any]) -> list[Step]:
    """Every step of the program in NumPy, in float64; steps inside calls and scans come before the
    call itself.
    """
    values: list[Any] = []
    steps: list[Step] = []
    for op, operands, params in dag.nodes:
        xs = tuple(values[k] for k in operands)
        if op in ("leaf", "input"):
            values.append((leaves if op == "leaf" else inputs)[params])
        elif op == "constant":
            values.append(params)
        elif op == "call":
            inner = evaluate(params[1], {}, xs)
            values.append(returned(inner))
            steps += inner
        elif op == "scan":
            values.append(_scan(params, xs, steps))
        else:
            result = OPERATIONS[op][0](params, *xs)
            values.append(result if isinstance(result, tuple) else np.asarray(result))
        steps.append(Step(op, xs, values[-1], params))
    steps.append(Step("return", tuple(values[k] for k in dag.outputs), None, None))
    return steps


def returned(steps: list[Step]) -> Any:
    """Takes the last step off: what a program returned; one value if it returns one."""
    values = steps.pop().operands
    return values if len(values) > 1 else values[0]


def _scan(params: Any, xs: Sequence[Any], steps: list[Step]) -> Any:
    body, layers, stacked, reverse = params
    carry, *rest = xs
    for k in reversed(range(layers)) if reverse else range(layers):
        inner = evaluate(
            body, {}, (carry, *(x[k] if s else x for x, s in zip(rest, stacked, strict=True)))
        )
        carry = returned(inner)
        steps += inner
    return carry


def function(dag: Dag) -> Callable[..., Any]:
    """The program as fn(params, *inputs) for JAX."""

    def fn(leaves, *inputs):
        values: list[Any] = []
        for op, operands, params in dag.nodes:
            xs = [values[k] for k in operands]
            if op in ("leaf", "input"):
                values.append((leaves if op == "leaf" else inputs)[params])
            elif op == "constant":
                values.append(_constant(params))
            elif op == "call":
                values.append(
                    WRAPPERS[params[0]](lambda *xs, body=params[1]: function(body)({}, *xs))(*xs)
                )
            elif op == "scan":
                values.append(_lax_scan(params, xs))
            else:
                values.append(OPERATIONS[op][1](params, *xs))
        results = tuple(values[k] for k in dag.outputs)
        return results if len(results) > 1 else results[0]

    return fn


def _constant(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    return value.astype(jnp.zeros(()).dtype) if value.dtype.kind == "f" else value


def _lax_scan(params: Any, xs: Sequence[Any]) -> Any:
    body, layers, stacked, reverse = params
    carry, *rest = xs

    def step(carry, sliced):
        now = iter(sliced)
        return function(body)(
            {}, carry, *(next(now) if s else x for x, s in zip(rest, stacked, strict=True))
        ), None

    return lax.scan(
        step,
        carry,
        [x for x, s in zip(rest, stacked, strict=True) if s],
        length=layers,
        reverse=reverse,
    )[0]
