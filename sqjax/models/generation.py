"""Greedy text generation as one compiled program: a prefill, then a loop of one-token steps."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sqjax.execution import quantized
from sqjax.models.model import Model, Params, TokenIds


@partial(jax.jit, static_argnames=("model", "steps"))
def greedy(model: Model, params: Params, prompt_ids: TokenIds, steps: int) -> Int[Array, "batch steps"]:
    """The ``steps`` tokens that follow each prompt when the likeliest token is taken every time.

    Compiled once for each model, number of steps and shape of the prompt. Float and quantized parameters both
    work. It does not stop at the end of a text: cut the answer at ``model.tokenizer.eos_id``.

    Args:
        model: a `Model`.
        params: its parameters, float or quantized by `sqjax.quantize`.
        prompt_ids: prompts of one length, without padding.
        steps: how many tokens to generate.

    Raises:
        ValueError: if the prompt is empty, ``steps`` is less than 1, or both together are more than
            ``config.max_length``.
    """
    batch, tokens = prompt_ids.shape
    if tokens < 1 or steps < 1:
        raise ValueError(
            f"greedy: expected at least one prompt token and one step, got {tokens} tokens and {steps} steps"
        )
    decode = quantized(model.decode)
    # Norm weights are never quantized, so this one tells the dtype in which the model computes.
    dtype = params["model"]["norm"]["weight"].dtype
    logits, cache = decode(params, prompt_ids, model.init_cache(batch, tokens + steps, dtype))

    def step(carry, _):
        token, cache = carry
        logits, cache = decode(params, token[:, None], cache)
        return (_likeliest(logits), cache), token

    (last, _), earlier = jax.lax.scan(step, (_likeliest(logits), cache), length=steps - 1)
    return jnp.concatenate([earlier.T, last[:, None]], axis=1)


def _likeliest(logits: Array) -> Int[Array, " batch"]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
