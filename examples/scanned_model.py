"""A linen network scanned over its layers, scales for each: python examples/scanned_model.py"""

import jax
import jax.numpy as jnp
from flax import linen as nn

import sqjax as sq


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.Dense(128, name="up")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(64, name="down")(nn.relu(h)), None


def main() -> dict[str, float]:
    layers = nn.scan(
        Layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=6,
    )()
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (32, 64))
    params = jax.jit(layers.init)(keys[1], x, None)["params"]
    gains = jnp.exp(
        2 * jax.random.normal(keys[2], (6, 64))
    )  # other outliers in every layer
    params["norm"]["scale"], params["up"]["kernel"] = (
        gains,
        params["up"]["kernel"] / gains[:, :, None],
    )
    fn = lambda params, x: layers.apply({"params": params}, x, None)[0]  # noqa: E731
    stats = sq.calibrate(fn, params, [x])
    print(stats.graph)
    smoothed = sq.smooth(params, stats, alpha=0.5)
    trees = {
        "float": smoothed,
        "int8": sq.quantize(params, stats),
        "smoothed int8": sq.quantize(smoothed, stats),
    }
    run, expected, errors = jax.jit(sq.quantized(fn)), fn(params, x), {}
    for name, tree in trees.items():
        errors[name] = float(
            jnp.linalg.norm(run(tree, x) - expected) / jnp.linalg.norm(expected)
        )
        print(f"{name:>14}: relative error {errors[name]:.2e}")
    return errors


if __name__ == "__main__":
    main()
