"""`sqjax embeddings`: its sentences, its measures, every row on a tiny encoder."""

import collections

import jax
import numpy as np
import pytest

import sqjax as sq
from sqjax.commands import embeddings
from sqjax.commands.embeddings import Size, agreement_of, sentences
from sqjax.commands.shared import shipped
from sqjax.models import Encoder, EncoderConfig
from sqjax.models.tokenizer import Tokenizer


def test_agreement_of_vectors():
    exact = np.array([[3.0, 0.0], [2.0, 1.0], [0.0, 5.0], [1.0, 2.0]])
    np.testing.assert_allclose(agreement_of(7 * exact, exact), 1.0, rtol=1e-12)
    turned = exact.copy()
    turned[1] = [0.0, -1.0]
    mean, least, same = agreement_of(turned, exact)
    cosine = -1 / np.sqrt(5)
    np.testing.assert_allclose([mean, least], [(3 + cosine) / 4, cosine])
    # [3, 0] was nearest to the second, and is now nearest to [1, 2].
    assert same == 0.75


def test_sentences_are_whole_ones_of_the_text():
    found = sentences("evaluation", 50)
    text = " ".join(shipped("evaluation").split())
    assert len(set(found)) == 50
    assert all(sentence in text and sentence[-1] in ".!?" for sentence in found)
    with pytest.raises(ValueError, match=r"expected 1000000 sentences of the evaluation text, got"):
        sentences("evaluation", 10**6)


def tiny_encoder():
    """An encoder whose tokens are the text's most frequent words."""
    tokenizers = pytest.importorskip("tokenizers")
    words = collections.Counter(shipped("calibration").split())
    vocabulary = {"[UNK]": 0} | {
        word: 1 + number for number, (word, _) in enumerate(words.most_common(98))
    }
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    config = EncoderConfig(99, 32, 32, 1, 2, max_length=64)
    encoder = Encoder(config, Tokenizer(backend, None))
    return encoder, jax.jit(encoder.init)(jax.random.key(0))


HOW = ("unsmoothed", "what folds", "at run time")


@pytest.mark.slow
def test_every_row(monkeypatch, capsys):
    found = tiny_encoder()
    monkeypatch.setattr(embeddings, "load_encoder", lambda name: found)
    monkeypatch.setattr(embeddings, "INT8", {"W8A8 O3": sq.W8A8_O3})
    rows = embeddings.embeddings(Size(32, 40, 1), "tiny")
    printed = capsys.readouterr().out
    names = [f"W8A8 O3, {how}" for how in HOW]
    assert [row.name for row in rows] == ["float32", *names, "W8A16"]
    exact, *others = rows
    assert (exact.mean_cosine, exact.same_nearest) == (pytest.approx(1, abs=1e-6), 1.0)
    for row in others:
        assert 0.98 < row.least_cosine < row.mean_cosine < 1 - 1e-7
        assert row.weight_bytes < exact.weight_bytes
        assert row.name in printed
    assert all(row.sentences_per_second > 0 for row in rows)
