"""The MLP of a block: one for all tokens, or experts between which a router chooses."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from sqjax.models.config import DecoderConfig, Experts
from sqjax.models.fusing import fused_name

#: The functions between an MLP's matmuls, by the names of `config.ACTIVATIONS`.
ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": nn.relu,
    "relu2": lambda x: jnp.square(nn.relu(x)),
}


def projections(
    module: nn.Module,
    layer: Callable[..., nn.Module],
    sizes: Mapping[str, int],
    *inputs: Array,
) -> list[Array]:
    """The outputs of several layers that read the same inputs, in the order of `sizes`.

    If `sqjax.models.fuse` has stored the layers as one, one matmul computes all outputs, side by
    side. With sizes 48, 16 and 16 they are split at 48 and 64.

    Args:
        module: whose parameters the layers' are.
        layer: layer(outputs, name=...) makes one.
        sizes: {name: number of outputs}.
        inputs: what each is called with.
    """
    fused = fused_name(tuple(sizes))
    if not module.has_variable("params", fused):
        return [layer(n, name=name)(*inputs) for name, n in sizes.items()]
    ends = np.cumsum(list(sizes.values()))
    outputs = layer(int(ends[-1]), name=fused)(*inputs)
    return jnp.split(outputs, ends[:-1], axis=-1)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), or without a gate down(act(up(x)))."""

    config: DecoderConfig
    intermediate_size: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens hidden"]
    ) -> Float[Array, "batch tokens hidden"]:
        config = self.config
        act = ACTIVATIONS[config.activation]
        use_bias = config.mlp_bias
        if config.gated_mlp:
            sizes = dict.fromkeys(
                ("gate_proj", "up_proj"), self.intermediate_size
            )
            dense = partial(nn.Dense, use_bias=use_bias)
            gate, up = projections(self, dense, sizes, x)
            inner = act(gate) * up
        else:
            first = nn.Dense(
                self.intermediate_size, use_bias=use_bias, name="up_proj"
            )
            inner = act(first(x))
        down = nn.Dense(config.hidden_size, use_bias=use_bias, name="down_proj")
        return down(inner)


class ExpertDense(nn.Module):
    """One matmul for each expert, on the rows that are its own; without biases."""

    experts: int
    features: int

    @nn.compact
    def __call__(
        self, rows: Float[Array, "rows in"], sizes: Int[Array, " experts"]
    ) -> Float[Array, "rows features"]:
        """Rows are sorted by expert: the first sizes[0] are expert 0's, and so on."""
        shape = (self.experts, rows.shape[-1], self.features)
        init = nn.initializers.lecun_normal(batch_axis=0)
        kernel = self.param("kernel", init, shape)
        return jax.lax.ragged_dot(rows, kernel, sizes)


class ExpertMLP(nn.Module):
    """The gated MLPs of all experts, on rows that are sorted by expert."""

    config: DecoderConfig
    experts: Experts

    @nn.compact
    def __call__(
        self, rows: Float[Array, "rows hidden"], sizes: Int[Array, " experts"]
    ) -> Float[Array, "rows hidden"]:
        inner = self.experts.intermediate_size
        dense = partial(ExpertDense, self.experts.count)
        outputs = dict.fromkeys(("gate_proj", "up_proj"), inner)
        gate, up = projections(self, dense, outputs, rows, sizes)
        act = ACTIVATIONS[self.config.activation]
        hidden = act(gate) * up
        down = dense(self.config.hidden_size, name="down_proj")
        return down(hidden, sizes)


class Mixture(nn.Module):
    """Experts that a router chooses for each token, and an MLP that sees all, where there is one.

    Each expert computes its tokens only: the tokens are sorted by expert, and a ragged matmul
    takes each expert's rows with its kernel. For 2 tokens that go to the experts (2, 0) and (2,
    1) the four rows are sorted to tokens 0, 1, 0, 1 of the experts 0, 1, 2, 2.
    """

    config: DecoderConfig
    experts: Experts

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens hidden"]
    ) -> Float[Array, "batch tokens hidden"]:
        experts = self.experts
        tokens = x.reshape(-1, x.shape[-1])
        router = nn.Dense(experts.count, use_bias=False, name="router")
        weights, chosen = _choose(router(tokens), experts)

        flat = chosen.reshape(-1)
        # order[i] is which of all (token, choice) pairs comes i-th once they are sorted by expert.
        order = jnp.argsort(flat)
        sizes = jnp.bincount(flat, length=experts.count)
        rows = tokens[order // experts.per_token]
        outputs = ExpertMLP(self.config, experts, name="experts")(rows, sizes)
        # The order of a permutation is its inverse: back to the order of tokens.
        by_token = outputs[jnp.argsort(order)].reshape(
            *chosen.shape, x.shape[-1]
        )
        mixed = jnp.einsum("tkd,tk->td", by_token, weights.astype(x.dtype))
        mixed = mixed.reshape(x.shape)
        if experts.shared_size is None:
            return mixed
        shared = MLP(self.config, experts.shared_size, name="shared_expert")(x)
        if experts.shared_gate:
            gate = nn.Dense(1, use_bias=False, name="shared_expert_gate")
            shared = jax.nn.sigmoid(gate(x)) * shared
        return mixed + shared


def _choose(
    logits: Float[Array, "tokens experts"], experts: Experts
) -> tuple[Float[Array, "tokens chosen"], Int[Array, "tokens chosen"]]:
    """The weights and the numbers of each token's experts, the likeliest first."""
    odds = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, chosen = jax.lax.top_k(_allowed(odds, experts), experts.per_token)
    if experts.normalized:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights * experts.scale, chosen


def _allowed(
    odds: Float[Array, "tokens experts"], experts: Experts
) -> Float[Array, "tokens experts"]:
    """The odds with 0 for experts of groups that are not kept.

    With 6 experts in 3 groups, of which one is kept, the odds (.1, .2, .3, .1, .2, .1) become (0,
    0, .3, .1, 0, 0).
    """
    if experts.groups_kept == experts.groups:
        return odds
    by_group = odds.reshape(odds.shape[0], experts.groups, -1)
    best = jnp.max(by_group, axis=-1)
    _, kept = jax.lax.top_k(best, experts.groups_kept)
    is_kept = jnp.any(jax.nn.one_hot(kept, experts.groups, dtype=bool), axis=1)
    return jnp.where(is_kept[:, :, None], by_group, 0.0).reshape(odds.shape)
