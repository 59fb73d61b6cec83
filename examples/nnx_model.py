"""From a float NNX model to jitted int8: python examples/nnx_model.py"""

import jax
import jax.numpy as jnp
from flax import nnx

import sqjax as sq


class Model(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.layers = nnx.List(
            [nnx.Linear(width, width, rngs=rngs) for _ in range(3)]
        )

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(self.norm(x)))
        return self.layers[-1](x)


def main() -> dict[str, float]:
    model = Model(128, nnx.Rngs(0))
    outliers = jnp.array(
        [3, 70]
    )  # two channels sixty times as large, as large models grow them
    model.norm.scale[...] = model.norm.scale[...].at[outliers].set(60.0)
    x = jax.random.normal(jax.random.key(1), (64, 128))
    fn, params = sq.nnx.functional(model)
    stats = sq.calibrate(fn, params, [x])
    smoothed = sq.smooth(params, stats, alpha=0.5)
    trees = {
        "float": smoothed,
        "int8": sq.quantize(params, stats),
        "smoothed int8": sq.quantize(smoothed, stats),
    }
    run, expected, errors = nnx.jit(lambda model, x: model(x)), model(x), {}
    for name, tree in trees.items():
        errors[name] = float(
            jnp.linalg.norm(run(sq.nnx.rebuild(fn, tree), x) - expected)
            / jnp.linalg.norm(expected)
        )
        print(f"{name:>14}: relative error {errors[name]:.2e}")
    return errors


if __name__ == "__main__":
    main()
