"""Trains adapters beside int4 kernels, and a norm before them: python examples/adapters.py"""

import jax
import jax.numpy as jnp
import optax

import sqjax as sq


def model(params, x):
    """A norm and two layers W + A B: W is quantized, the adapters A and B are trained."""
    h = (
        x
        / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
        * params["norm"][None]
    )
    for layer in (params["up"], params["down"]):
        h = jnp.tanh(
            h @ layer["kernel"] + (h @ layer["lora_a"]) @ layer["lora_b"]
        )
    return h


def layer(key, inputs, outputs, rank=4):
    kernel, a = jax.random.split(key)
    return {
        "kernel": jax.random.normal(kernel, (inputs, outputs)) / inputs**0.5,
        "lora_a": jax.random.normal(a, (inputs, rank)) / inputs**0.5,
        "lora_b": jnp.zeros(
            (rank, outputs)
        ),  # so that training starts from the kernel alone
    }


def main(scheme=sq.W4A16_G64, steps=60):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "norm": jnp.ones(64),
        "up": layer(keys[0], 64, 128),
        "down": layer(keys[1], 128, 8),
    }
    x = jax.random.normal(keys[2], (32, 64))
    target = jnp.tanh(x @ jax.random.normal(keys[3], (64, 8)) / 8)
    # It warns that lora_b is zeros. Nothing is smoothed here, so that does no harm.
    stats = sq.calibrate(model, params, [x])
    qparams = sq.quantize(params, stats, {"lora": None, "kernel": scheme})

    trained, frozen = sq.split(qparams, ["lora", "norm"])
    optimizer = optax.adam(1e-2)

    def loss(trained):
        return jnp.mean(
            (sq.quantized(model)(sq.merge(trained, frozen), x) - target) ** 2
        )

    @jax.jit
    def step(trained, state):
        value, gradient = jax.value_and_grad(loss)(trained)
        changes, state = optimizer.update(gradient, state)
        return optax.apply_updates(trained, changes), state, value

    state, losses = optimizer.init(trained), []
    for _ in range(steps):
        trained, state, value = step(trained, state)
        losses.append(float(value))
    print(
        f"{scheme}: loss {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps"
    )
    return losses


if __name__ == "__main__":
    main()
