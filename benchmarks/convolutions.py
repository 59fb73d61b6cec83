"""A ResNet and a ConvNeXt, linen and NNX, trained for a minute and quantized; convolutions, timed.

    python benchmarks/convolutions.py --record benchmarks/records/convolutions.json

Each architecture is written once. Linen trains it; the NNX module holds the same parameters.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

import sqjax as sq
from sqjax.commands.cells import text
from sqjax.commands.layouts_of_quality import convolutional_models
from sqjax.commands.layouts_of_speed import convolution_speeds
from sqjax.commands.records import Row, make_record, write_record
from sqjax.weights.quant_weight import QuantWeight

CLASSES, SIZE, BATCH, STEPS, TESTS = 10, 16, 32, 150, 1000

# The task: which of ten smooth patterns, shifted, dimmed and under noise, is this? ----------------


def images(
    rng: np.random.Generator, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels)."""
    waves = np.random.default_rng(7).normal(size=(CLASSES, 4, 4, 3))
    patterns = jax.image.resize(
        jnp.asarray(waves), (CLASSES, SIZE, SIZE, 3), "cubic"
    )
    labels = rng.integers(0, CLASSES, count)
    shifts = rng.integers(-4, 5, (count, 2))
    chosen = np.asarray(patterns)[labels]
    moved = [np.roll(x, s, (0, 1)) for x, s in zip(chosen, shifts, strict=True)]
    dimmed = np.stack(moved) * rng.uniform(0.3, 1.0, (count, 1, 1, 1))
    noisy = dimmed + 1.5 * rng.normal(size=dimmed.shape)
    return noisy.astype(np.float32), labels


# The architectures -------------------------------------------------------------------------------


def resnet(layers: Any, x: Any) -> Any:
    """Three stages of one block each, with BatchNorm and shortcuts."""
    x = nn.relu(layers.norm("stem_norm", layers.conv("stem", x, 32, 3)))
    for i, (width, stride) in enumerate(((32, 1), (64, 2), (128, 2))):
        h = layers.conv(f"conv{i}a", x, width, 3, stride)
        h = nn.relu(layers.norm(f"norm{i}a", h))
        h = layers.norm(f"norm{i}b", layers.conv(f"conv{i}b", h, width, 3))
        if x.shape != h.shape:
            shortcut = layers.conv(f"shortcut{i}", x, width, 1, stride)
            x = layers.norm(f"shortcut_norm{i}", shortcut)
        x = nn.relu(x + h)
    return layers.dense("head", x.mean((1, 2)), CLASSES)


def convnext(layers: Any, x: Any) -> Any:
    """Patches, then two stages of one block each: depthwise 7 x 7, LayerNorm, pointwise, GELU."""
    x = layers.layer_norm(
        "stem_norm", layers.conv("stem", x, 64, 2, 2, bias=True)
    )
    for i, width in enumerate((64, 320)):
        if i:
            x = layers.layer_norm("down_norm", x)
            x = layers.conv("down", x, width, 2, 2, bias=True)
        h = layers.conv(f"depthwise{i}", x, width, 7, groups=width, bias=True)
        h = layers.layer_norm(f"norm{i}", h)
        h = nn.gelu(layers.dense(f"wide{i}", h, 4 * width))
        x = x + layers.dense(f"narrow{i}", h, width)
    return layers.dense(
        "head", layers.layer_norm("last_norm", x.mean((1, 2))), CLASSES
    )


class LinenLayers:
    """The layers of the linen module that is being called."""

    def __init__(self, train: bool):
        self.train = train

    def conv(self, name, x, features, size, stride=1, groups=1, bias=False):
        layer = nn.Conv(
            features,
            (size, size),
            stride,
            feature_group_count=groups,
            use_bias=bias,
            name=name,
        )
        return layer(x)

    def norm(self, name, x):
        return nn.BatchNorm(not self.train, momentum=0.9, name=name)(x)

    def layer_norm(self, name, x):
        return nn.LayerNorm(name=name)(x)

    def dense(self, name, x, features):
        return nn.Dense(features, name=name)(x)


class Linen(nn.Module):
    """An architecture in linen."""

    architecture: Callable[[Any, Any], Any]

    @nn.compact
    def __call__(self, x, train=False):
        return self.architecture(LinenLayers(train), x)


class Nnx(nnx.Module):
    """An architecture in NNX: its layers are made on the first image that it sees."""

    def __init__(self, architecture: Callable[[Any, Any], Any]):
        self.architecture = nnx.static(architecture)
        self.architecture(self, jnp.zeros((1, SIZE, SIZE, 3)))

    def __call__(self, x):
        return self.architecture(self, x)

    def _layer(self, name, make):
        if not hasattr(self, name):
            setattr(self, name, make(rngs=nnx.Rngs(0)))
        return getattr(self, name)

    def conv(self, name, x, features, size, stride=1, groups=1, bias=False):
        fields = {"feature_group_count": groups, "use_bias": bias}
        shape = x.shape[-1], features, (size, size), stride
        return self._layer(name, partial(nnx.Conv, *shape, **fields))(x)

    def norm(self, name, x):
        make = partial(nnx.BatchNorm, x.shape[-1], use_running_average=True)
        return self._layer(name, make)(x)

    def layer_norm(self, name, x):
        return self._layer(name, partial(nnx.LayerNorm, x.shape[-1]))(x)

    def dense(self, name, x, features):
        return self._layer(name, partial(nnx.Linear, x.shape[-1], features))(x)


def trained(architecture: Callable[[Any, Any], Any], steps: int) -> Any:
    """The linen variables after a short training."""
    module = Linen(architecture)
    variables = module.init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    rest = {k: v for k, v in variables.items() if k != "params"}
    optimizer = optax.adamw(
        optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-3
    )
    state = optimizer.init(variables["params"])

    def loss(params, rest, x, labels):
        every = {"params": params, **rest}
        logits, changed = module.apply(every, x, train=True, mutable=list(rest))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), changed

    @jax.jit
    def step(params, rest, state, x, labels):
        grads, changed = jax.grad(loss, has_aux=True)(params, rest, x, labels)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), changed, state

    rng, params = np.random.default_rng(1), variables["params"]
    for _ in range(steps):
        params, rest, state = step(params, rest, state, *images(rng, BATCH))
    return {"params": params, **rest}


# Quantized ---------------------------------------------------------------------------------------


def apply_linen(module: Linen, variables: Any, params: Any, x: Any) -> Any:
    """The linen module as a function of its parameters."""
    return module.apply({**variables, "params": params}, x)


def nnx_function(architecture: Any, variables: Any) -> Callable[..., Any]:
    """The NNX module as a function of linen's parameters, with linen's batch statistics."""
    module = Nnx(architecture)
    for name, statistics in variables.get("batch_stats", {}).items():
        layer = getattr(module, name)
        layer.mean[...], layer.var[...] = statistics["mean"], statistics["var"]
    fn, _ = sq.nnx.functional(module)
    return fn


def weight_bytes(params: Any) -> int:
    """Bytes of a tree, quantized or not."""
    return sum(x.nbytes for x in jax.tree.leaves(params))


def of_models(steps: int, tests: int) -> Iterator[Row]:
    """The accuracy and size of every model under every scheme."""
    x, labels = images(np.random.default_rng(2), tests)
    seen = [images(np.random.default_rng(3), 256)[0]]
    for architecture in (resnet, convnext):
        variables = trained(architecture, steps)
        params = variables["params"]

        linen_fn = partial(apply_linen, Linen(architecture), variables)
        functions = {
            "linen": linen_fn,
            "NNX": nnx_function(architecture, variables),
        }
        for framework, fn in functions.items():
            stats = sq.calibrate(fn, params, seen)
            smoothing = sq.scales(params, stats, 0.5)
            smoothed = sq.fold(params, stats.graph, smoothing)
            derived = sq.fold_stats(stats, smoothing)
            trees = {
                "float32": params,
                "W8A8": sq.quantize(params, stats, sq.W8A8),
                "smoothed W8A8": sq.quantize(smoothed, derived, sq.W8A8),
                "static W8A8": sq.quantize(params, stats, sq.W8A8_O3),
                "smoothed static W8A8": sq.quantize(
                    smoothed, derived, sq.W8A8_O3
                ),
            }
            if framework == "NNX":  # the same numbers: the smoothed ones tell
                del trees["W8A8"], trees["static W8A8"]
            run = jax.jit(sq.quantized(fn))
            exact = np.asarray(run(params, x))
            for scheme, tree in trees.items():
                logits = np.asarray(run(tree, x))
                error = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
                right = np.argmax(logits, -1) == labels
                yield {
                    "model": architecture.__name__,
                    "framework": framework,
                    "scheme": scheme,
                    "accuracy": float(right.mean()),
                    "logit_error": float(error),
                    "images": tests,
                    "weight_bytes": weight_bytes(tree),
                }


# Speed -------------------------------------------------------------------------------------------

#: name: (batch, height, channels, outputs, window, stride, groups)
SHAPES = {
    "7 x 7 of 3 channels, stride 2, at 224": (1, 224, 3, 64, 7, 2, 1),
    "patches of 16 x 16 at 224": (1, 224, 3, 384, 16, 16, 1),
    "3 x 3 of 64 channels at 56": (1, 56, 64, 64, 3, 1, 1),
    "3 x 3 of 256 channels at 14": (1, 14, 256, 256, 3, 1, 1),
    "1 x 1, 256 to 512 channels at 28": (1, 28, 256, 512, 1, 1, 1),
    "depthwise 7 x 7 of 192 channels at 28": (1, 28, 192, 192, 7, 1, 192),
}
LAYOUT = ("NHWC", "HWIO", "NHWC")


def of_shapes(repeats: int) -> Iterator[Row]:
    """float32, XLA's own int8 convolution in the same program, and ours, timed in turns."""
    for name, (
        batch,
        size,
        channels,
        outputs,
        window,
        stride,
        groups,
    ) in SHAPES.items():
        rng = np.random.default_rng(0)
        x = jnp.asarray(
            rng.normal(size=(batch, size, size, channels)), jnp.float32
        )
        shape = window, window, channels // groups, outputs
        w = jnp.asarray(rng.normal(size=shape), jnp.float32)
        padding = "VALID" if stride == window else "SAME"

        def run(x, w, of=None, stride=stride, padding=padding, groups=groups):
            return lax.conv_general_dilated(
                x,
                w,
                (stride, stride),
                padding,
                dimension_numbers=LAYOUT,
                feature_group_count=groups,
                preferred_element_type=of,
            )

        def fn(params, x, run=run):
            return run(x, params["w"])

        params = {"w": w}
        qparams = sq.quantize(params, sq.calibrate(fn, params, [x]), sq.W8A8_O3)
        weight: QuantWeight = qparams["w"]

        def by_xla(weight, x, run=run):
            q = jnp.clip(jnp.round(x / weight.input_scale), -127, 127).astype(
                jnp.int8
            )
            codes = weight.tensor.values.transpose(1, 2, 3, 0)
            return run(q, codes, jnp.int32).astype(
                jnp.float32
            ) * weight.tensor.scale.reshape(-1)

        programs = {
            "float": (jax.jit(fn), params),
            "xla_int8": (jax.jit(by_xla), weight),
            "ours": (jax.jit(sq.quantized(fn)), qparams),
        }
        seconds: dict[str, list[float]] = {key: [] for key in programs}
        for turn, (key, (program, tree)) in itertools.product(
            range(repeats + 1), programs.items()
        ):
            begin = time.perf_counter()
            program(tree, x).block_until_ready()
            if turn:  # the first compiles
                seconds[key].append(time.perf_counter() - begin)
        medians = {
            f"{key}_seconds": float(np.median(s)) for key, s in seconds.items()
        }
        yield {"convolution": name, **medians}


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--tests", type=int, default=TESTS)
    parser.add_argument(
        "--repeats", type=int, default=9, help="of the timings; 0: none"
    )
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    rows = [*of_models(options.steps, options.tests)]
    print(text(convolutional_models(rows)))
    if options.repeats:
        rows += of_shapes(options.repeats)
        print(text(convolution_speeds(rows)))
    if options.record:
        run = ["python", "benchmarks/convolutions.py"]
        write_record(
            options.record, make_record(run, rows, time.perf_counter() - begin)
        )
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
