"""A tiny Llama with grouped heads, random parameters for it, and a tokenizer of letters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sqjax.models import LlamaConfig, Model
from sqjax.models.config import LayerKind
from sqjax.models.rope import Rope
from sqjax.models.tokenizer import Tokenizer

#: Its matrices have two shapes, (32, 32) and that of keys and values: each is a program of what quantizes.
GROUPED = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    tie_embeddings=True,
    max_length=64,
)


def looking_back(window=None, theta=10000.0):
    """The field `kinds` of a model whose layers are all alike."""
    return (LayerKind(window, Rope(theta)),)


def random_params(model, seed=0):
    """Every leaf random, gains and biases too: at their initial ones and zeros they would test nothing."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, noise = path[-1].key, rng.normal(size=leaf.shape)
        by_name = {"weight": 1 + 0.4 * noise, "kernel": 1.5 * noise / leaf.shape[0] ** 0.5}
        return jnp.asarray(np.asarray(by_name.get(name, noise), np.float32))

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))


def random_ids(batch, tokens, seed=1):
    """Token ids that every tiny model knows."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, GROUPED.vocab_size, (batch, tokens)))


@functools.cache
def compiled(config, method):
    """A method of a configuration's model, jitted once for all tests: each shape is compiled once."""
    return jax.jit(getattr(Model(config), method))


class Letters(Tokenizer):
    """Each letter is a token."""

    def encode(self, text):
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids):
        return "".join(chr(int(i) + ord("a")) for i in ids)
