"""One image encoder in Flax linen for every family: a `VisionConfig` says what it computes.

Images have their channels last, (batch, rows, columns, channels), as usual in JAX.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sqjax.models.attention import Scoring, attend
from sqjax.models.decoder import Layers
from sqjax.models.mlp import ACTIVATIONS, MLP
from sqjax.models.norms import NormLayer
from sqjax.models.positions import Positions
from sqjax.models.self_attention import View
from sqjax.models.slots import Slots
from sqjax.models.vision_config import VisionConfig


def cut(
    pixels: Float[Array, "batch rows columns channels"], size: int
) -> Float[Array, "batch patches numbers"]:
    """The patches of images, row after row, each as one vector.

    Images of 13 x 13 x 3 in patches of 4 have 3 x 3 patches of 4 * 4 * 3 numbers; the last row and
    the last column are in none.
    """
    batch, rows, columns, channels = pixels.shape
    down, across = rows // size, columns // size
    whole = pixels[:, : down * size, : across * size]
    grid = whole.reshape(batch, down, size, across, size, channels)
    by_patch = grid.transpose(0, 1, 3, 2, 4, 5)
    return by_patch.reshape(batch, down * across, size * size * channels)


class Tower(nn.Module):
    """Patches, positions and layers."""

    config: VisionConfig
    remat: bool = False

    def setup(self):
        """Names the parts as the decoder does, where it has them."""
        config = self.config
        size = config.hidden_size
        # A convolution whose patches do not overlap is one matmul, which can run in int8.
        self.embed_patches = nn.Dense(size, use_bias=config.patch_bias)
        if config.class_token:
            self.class_token = self.param(
                "class_token", nn.initializers.normal(0.02), (1, size)
            )
        self.embed_positions = nn.Embed(config.tokens, size)
        if config.embedding_norm:
            self.embed_layernorm = NormLayer(config.norm)
        self.layers = Layers(config.layers, self.remat)
        self.norm = NormLayer(config.norm)

    def __call__(
        self, pixels: Float[Array, "batch rows columns channels"]
    ) -> Float[Array, "batch tokens hidden"]:
        """The tokens after the last layer; normed, where the final norm is theirs."""
        x = self.embed(pixels)
        tokens = x.shape[1]
        # Every patch looks at every other. Where they stand, the embedding says.
        views = (View(None, jnp.ones((1, tokens, tokens), bool)),)
        numbers = jnp.arange(tokens, dtype=jnp.int32)[None]
        positions = Positions(views, jnp.int32(0), numbers)
        x, _ = self.layers(x, positions, None)
        return self.norm(x) if self.config.final_norm == "tokens" else x

    def embed(
        self, pixels: Float[Array, "batch rows columns channels"]
    ) -> Float[Array, "batch tokens hidden"]:
        """What the first layer reads."""
        positions = self.embed_positions.embedding
        # The whole model is computed in the dtype of its parameters.
        pixels = pixels.astype(positions.dtype)
        x = self.embed_patches(cut(pixels, self.config.patch_size))
        if self.config.class_token:
            shape = (x.shape[0], 1, x.shape[2])
            first = jnp.broadcast_to(self.class_token.astype(x.dtype), shape)
            x = jnp.concatenate([first, x], axis=1)
        x = x + positions[None]
        return self.embed_layernorm(x) if self.config.embedding_norm else x

    def norm_pooled(
        self, pooled: Float[Array, "batch hidden"]
    ) -> Float[Array, "batch hidden"]:
        """The vector of each image; normed, where the final norm is its."""
        is_pooled = self.config.final_norm == "pooled"
        return self.norm(pooled) if is_pooled else pooled


class AttentionPooler(nn.Module):
    """A learned query that looks at all tokens, and an MLP beside the residual."""

    config: VisionConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens hidden"]
    ) -> Float[Array, "batch hidden"]:
        config, size = self.config, self.config.hidden_size
        probe = self.param("probe", nn.initializers.normal(0.02), (1, size))
        asking = jnp.broadcast_to(probe.astype(x.dtype), (x.shape[0], 1, size))
        # Another name than the layers' q_proj, because q, k and v can not be one matmul here.
        queries = nn.Dense(size, name="probe_proj")(asking)
        keys = nn.Dense(size, name="k_proj")(x)
        values = nn.Dense(size, name="v_proj")(x)
        mixed = _attended(config, queries, keys, values)
        pooled = nn.Dense(size, name="o_proj")(mixed)
        normed = NormLayer(config.norm, name="norm")(pooled)
        mlp = MLP(config.layers, config.intermediate_size, name="mlp")
        return (pooled + mlp(normed))[:, 0]


def _attended(
    config: VisionConfig,
    queries: Float[Array, "batch seeing hidden"],
    keys: Float[Array, "batch tokens hidden"],
    values: Float[Array, "batch tokens hidden"],
) -> Float[Array, "batch seeing hidden"]:
    """Attention, head by head, of queries that look at all tokens."""
    batch, tokens, size = keys.shape
    by_head = (batch, -1, config.num_heads, size // config.num_heads)
    queries = queries.reshape(by_head)
    # Slots have them as (batch, heads, tokens, head_dim).
    held = Slots(keys.reshape(by_head).swapaxes(1, 2))
    others = Slots(values.reshape(by_head).swapaxes(1, 2))
    mask = jnp.ones((1, queries.shape[1], tokens), bool)
    scoring = Scoring(queries.shape[-1] ** -0.5)
    mixed = attend(queries, held, others, mask, False, scoring)
    return mixed.reshape(batch, -1, size)


class ImageEncoder(nn.Module):
    """A tower with what follows it: the pooled vector, its projection, and a head of classes."""

    config: VisionConfig
    remat: bool = False

    def setup(self):
        """Makes the parts that the configuration has."""
        config = self.config
        self.model = Tower(config, self.remat)
        if config.pooling == "attention":
            self.attention_pooler = AttentionPooler(config)
        if config.pooler_size is not None:
            self.pooler = nn.Dense(config.pooler_size)
        if config.projection_size is not None:
            self.projection = nn.Dense(config.projection_size, use_bias=False)
        if config.num_classes is not None:
            self.classifier = nn.Dense(config.num_classes)

    def __call__(
        self, pixels: Float[Array, "batch rows columns channels"]
    ) -> Float[Array, "batch tokens hidden"]:
        """The tokens of each image."""
        return self.model(pixels)

    def embed(
        self, pixels: Float[Array, "batch rows columns channels"]
    ) -> Float[Array, "batch size"]:
        """The vector of each image."""
        return self._pooled(self.model(pixels))

    def classify(
        self, pixels: Float[Array, "batch rows columns channels"]
    ) -> Float[Array, "batch classes"]:
        """The logits of the classes."""
        return self._logits(self.model(pixels))

    def everything(
        self, pixels: Float[Array, "batch rows columns channels"]
    ) -> list[Array]:
        """All that the model computes, so that every parameter is made."""
        x = self.model(pixels)
        # Where nothing is pooled, there is still the tower's norm to be made.
        found = [x, self.model.norm(x)]
        if self.config.pooling is not None:
            found.append(self._pooled(x))
        if self.config.num_classes is not None:
            found.append(self._logits(x))
        return found

    def _pooled(
        self, x: Float[Array, "batch tokens hidden"]
    ) -> Float[Array, "batch size"]:
        """One vector of each image's tokens."""
        config = self.config
        if config.pooling == "attention":
            pooled = self.attention_pooler(x)
        else:
            pooled = self.model.norm_pooled(x[:, 0])
        if config.pooler_size is not None:
            act = _ACTIVATIONS[config.pooler_activation]
            pooled = act(self.pooler(pooled))
        if config.projection_size is not None:
            pooled = self.projection(pooled)
        return pooled

    def _logits(
        self, x: Float[Array, "batch tokens hidden"]
    ) -> Float[Array, "batch classes"]:
        """The logits of the classes, of the tokens and not of what a pooler makes of them."""
        first = self.model.norm_pooled(x[:, 0])
        if not self.config.class_and_mean:
            return self.classifier(first)
        mean = jnp.mean(x[:, 1:], axis=1)
        return self.classifier(jnp.concatenate([first, mean], axis=-1))


_ACTIVATIONS = {"tanh": jnp.tanh, **ACTIVATIONS}
