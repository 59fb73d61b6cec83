"""all-MiniLM-L6-v2, a real encoder, against torch (downloaded if it is not in the cache)."""

from pathlib import Path

import numpy as np
import pytest

import sqjax as sq
from sqjax.models import load_encoder, stack_layers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def minilm():
    """(the encoder, its parameters, sentences, torch's embeddings).

    The layers are in one stack, whose program is that of one layer.
    """
    with np.load(Path(__file__).parent / "vectors" / "minilm.npz") as arrays:
        sentences, expected = arrays["sentences"].tolist(), arrays["embeddings"]
    encoder, params = load_encoder("all-minilm-l6-v2")
    return encoder, stack_layers(params), sentences, expected


def test_embeddings_are_those_of_torch(minilm):
    encoder, params, sentences, expected = minilm
    got = encoder.encode(params, sentences)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_int8_embeddings_are_near(minilm):
    """Cosines of at least 0.99 by a scale for each token, as measured on 64 other sentences."""
    encoder, params, sentences, expected = minilm
    # The last one is long, which takes long in int8 on a CPU.
    sentences, expected = sentences[:-1], expected[:-1]
    batches = encoder.batches(sentences, batch=8)
    stats = sq.calibrate(encoder.embed, params, batches, mask=lambda ids, mask: mask)
    qparams = sq.quantize(params, stats, sq.W8A8_O1)
    cosines = np.sum(encoder.encode(qparams, sentences) * expected, axis=1)
    assert 0.99 < cosines.min() < 0.99999
