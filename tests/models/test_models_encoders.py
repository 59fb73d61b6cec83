"""Encoders of texts against what torch transformers computes with the same tiny random checkpoints."""

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
import tiny_checkpoint
from safetensors.numpy import save_file
from slow import slow_but
from traced import graph_of

import sqjax as sq
from sqjax.models import Encoder, EncoderConfig, Pooling, load, load_encoder, stack_layers
from sqjax.models import families as f
from sqjax.models.checkpoints import encoders
from sqjax.models.checkpoints.families.known import FAMILIES
from sqjax.models.checkpoints.huggingface import read_config
from sqjax.models.encoder import distance_buckets, places
from sqjax.models.pooling import POOLINGS, pool
from sqjax.models.text.batches import Reading, prepared, text_batches

#: Nomic's BERT, which is not known here: turning queries and keys, a gated MLP, other names.
NOMIC = f.Family(
    "nomic_bert",
    fields={
        **f.BERT_FIELDS,
        "attention_bias": False,
        "mlp_bias": False,
        "learned_positions": False,
        "kinds": lambda settings: (
            f.LayerKind(None, f.rope(settings, f.head_dim(settings), theta=1000.0)),
        ),
        "gated_mlp": True,
        "activation": f.activation("hidden_act", "silu"),
    },
    rows=(
        *f.BERT_ROWS[:3],
        *f.norm("emb_ln", "model/embed_layernorm"),
        *f.several("encoder.layers.{layer}.attn.Wqkv", f.QKV),
        *f.dense("encoder.layers.{layer}.attn.out_proj", f"{f.OUR_LAYER}/self_attn/o_proj"),
        *f.dense("encoder.layers.{layer}.mlp.fc11", f"{f.OUR_LAYER}/mlp/up_proj"),
        *f.dense("encoder.layers.{layer}.mlp.fc12", f"{f.OUR_LAYER}/mlp/gate_proj"),
        *f.dense("encoder.layers.{layer}.mlp.fc2", f"{f.OUR_LAYER}/mlp/down_proj"),
        *f.norm("encoder.layers.{layer}.norm1", f"{f.OUR_LAYER}/post_attention_layernorm"),
        *f.norm("encoder.layers.{layer}.norm2", f"{f.OUR_LAYER}/post_feedforward_layernorm"),
    ),
    config_type=EncoderConfig,
)
CASES = tiny_checkpoint.cases("encoders")
POOL = jax.jit(pool, static_argnums=0)


def case_of(name):
    return tiny_checkpoint.load(name, "encoders")


@functools.cache
def loaded(name):
    """(its arrays, the encoder, its parameters) of a case."""
    case = case_of(name)
    with tempfile.TemporaryDirectory() as folder:
        version = min(case["configs"])
        directory = tiny_checkpoint.write(case, Path(folder) / "model", version)
        return case["vectors"], *load_encoder(directory, families=[NOMIC])


def assert_close(got, expected, tolerance=1e-5):
    largest = np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * largest)


def six_rows(vectors):
    """(ids, mask) of two rows without padding, two with some behind and two with some in front."""
    parts = [vectors["ids"], vectors["padded_ids"], vectors["left_ids"]]
    whole = np.ones_like(vectors["mask"])
    return np.concatenate(parts), np.concatenate([whole, vectors["mask"], vectors["left_mask"]])


def expected_states(vectors):
    """What torch has for the real tokens of `six_rows`, (62, channels)."""
    whole = vectors["states"].reshape(-1, vectors["states"].shape[-1])
    return np.concatenate([whole, vectors["padded_states"], vectors["left_states"]])


QUICK = ("bert", "mpnet", "modernbert_biases")


@pytest.mark.parametrize("name", slow_but(CASES, *QUICK))
def test_states_are_those_of_torch(name):
    """Without padding, with some behind and with some in front."""
    vectors, encoder, params = loaded(name)
    ids, mask = six_rows(vectors)
    states = np.asarray(jax.jit(encoder.apply)(params, ids, mask))
    assert_close(states[mask == 1], expected_states(vectors))


def test_without_a_mask_all_tokens_count_and_types_are_added():
    vectors, encoder, params = loaded("bert")
    got = jax.jit(encoder.apply)(params, vectors["ids"], None, vectors["types"])
    assert_close(got, vectors["typed_states"])
    assert np.abs(vectors["typed_states"] - vectors["states"]).max() > 0.1


@pytest.mark.parametrize("name", CASES)
def test_both_versions_of_the_configuration_are_one_model(name):
    _, encoder, _ = loaded(name)
    for config in case_of(name)["configs"].values():
        _, found = read_config(config, families=[NOMIC], config_type=EncoderConfig)
        assert found == encoder.config


@pytest.mark.slow  # transformers takes seconds to import
def test_what_the_installed_transformers_writes_is_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    for name in sorted(set(CASES) - {"nomic_bert"}):
        values = case_of(name)["configs"]["4"]
        transformers.AutoConfig.for_model(**values).save_pretrained(tmp_path / name)
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert read_config(written, config_type=EncoderConfig)[1] == loaded(name)[1].config


def test_buckets_of_distances():
    """At 32 buckets, written out from the formula: exact up to 7, then by a factor of 16^(1/8)."""
    found = distance_buckets(200, 32)
    ends = [8 * 16 ** (i / 8) for i in range(8)]
    for distance in range(200):
        # A distance that is an end, such as 16, begins the next bucket.
        far = 7 + sum(distance >= end - 1e-6 for end in ends)
        bucket = distance if distance < 8 else far
        assert found[distance, 0] == bucket
        assert found[0, distance] == bucket + 16 * (distance > 0)


def test_a_window_and_the_place_of_a_norm():
    _, encoder, params = loaded("modernbert_biases")
    config = encoder.config
    assert [kind.sliding_window for kind in config.kinds] == [None, 5, None, 5]
    assert [kind.rope.theta for kind in config.kinds] == [5000.0, 70.0, 5000.0, 70.0]
    has_norm = ["input_layernorm" in params["model"]["layers"][str(i)] for i in range(4)]
    assert has_norm == [False, True, True, True]


# Pooling ------------------------------------------------------------------------------------------


def test_pooled_states_are_those_of_sentence_transformers():
    """Padding holds large numbers, which must not count."""
    vectors, _, _ = loaded("bert")
    mask = vectors["mask"].astype(bool)
    states = np.full((*mask.shape, 32), 1e3, np.float32)
    states[mask] = vectors["padded_states"]
    states, mask = jnp.asarray(states), jnp.asarray(mask)
    together = POOL(Pooling(POOLINGS), states, mask)
    for number, mode in enumerate(POOLINGS):
        got = together[:, 32 * number : 32 * (number + 1)]
        np.testing.assert_allclose(got, vectors[mode], rtol=1e-5, atol=1e-6)
    unit = POOL(Pooling(("mean",), normalize=True), states, mask)
    lengths = np.linalg.norm(vectors["mean"], axis=1, keepdims=True)
    np.testing.assert_allclose(unit, vectors["mean"] / lengths, rtol=1e-5, atol=1e-6)


def test_a_row_of_padding_is_zero_and_never_nan():
    states = jnp.ones((1, 3, 4))
    mask = jnp.zeros((1, 3), bool)
    for mode in ("mean", "mean_sqrt_len", "max"):
        np.testing.assert_array_equal(POOL(Pooling((mode,), True), states, mask), np.zeros((1, 4)))


@pytest.mark.parametrize("modes", [(), ("median",), ("mean", "lasttoken")])
def test_poolings_that_are_refused(modes):
    with pytest.raises(ValueError, match=r"Pooling\.modes: expected a tuple of some of \('cls'"):
        Pooling(modes)


# Texts --------------------------------------------------------------------------------------------

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"]
SENTENCES = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.models.Pooling",
        },
        {"idx": 2, "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "1_Pooling/config.json": {
        "word_embedding_dimension": 32,
        "pooling_mode_cls_token": True,
        "pooling_mode_mean_tokens": True,
    },
    "sentence_bert_config.json": {"max_seq_length": 20, "do_lower_case": True},
}


def written(directory, files, case=None):
    """A checkpoint with a tokenizer of single letters, whose file says to cut and fill to 6."""
    tokenizers = pytest.importorskip("tokenizers")
    case = case or case_of("bert")
    tiny_checkpoint.write(case, directory)
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    backend.enable_truncation(6)
    backend.enable_padding(length=6)
    backend.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return directory


def ids_of(text):
    """The ids of a text of letters."""
    return [1, *(WORDS.index(letter) for letter in text.lower().split()), 2]


def test_texts_are_read_as_the_files_say(tmp_path):
    """Cut to 20 tokens, never to 6; lower case; in any order and of any number."""
    encoder, params = load_encoder(written(tmp_path, SENTENCES))
    assert encoder.pooling == Pooling(("cls", "mean"), normalize=True)
    letters = "a B c d E f g h i j k l m n o p q r s t u v"
    # All are filled to 20, so that one program serves both batches.
    texts = [letters[: 2 * count] for count in (16, 22, 15, 18, 17, 19)]
    got = encoder.encode(params, texts, batch=3)
    rows = np.zeros((6, 20), np.int32)
    mask = np.zeros((6, 20), np.int32)
    for number, text in enumerate(texts):
        ids = ids_of(text)
        ids = [*ids[: min(len(ids) - 1, 19)], 2]
        rows[number, : len(ids)], mask[number, : len(ids)] = ids, 1
    expected = jax.jit(encoder.embed)(params, rows, mask)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
    assert got.shape == (6, 64)
    assert got.dtype == np.float32
    assert encoder.encode(params, []).shape == (0, 64)
    # What `encoder.tokenizer` gives of itself is not cut or filled either.
    assert encoder.tokenizer.encode("a b c d e f g") == ids_of("a b c d e f g")


@pytest.mark.slow
def test_a_prompt_stands_before_every_text(tmp_path):
    files = {"default_prompt_name": "query", "prompts": {"query": "q ", "passage": "p "}}
    files = {**SENTENCES, "config_sentence_transformers.json": files}
    encoder, params = load_encoder(written(tmp_path, files))
    assert encoder.reading.prompt == "q "
    plain = encoder.encode(params, ["q a b", "p a b", "a b"], prompt="")
    usual = encoder.encode(params, ["a b", "b", "a"])[0]
    other = encoder.encode(params, ["a b", "b", "a"], prompt="p ")[0]
    np.testing.assert_allclose([usual, other], plain[:2], rtol=0, atol=1e-6)


def test_few_shapes():
    """Widths and rows are powers of two, or the limits."""
    lengths = [7, 40, 100, 17, 3, 60, 16, 33]
    batches = list(text_batches([[5] * n for n in lengths], rows=3, limit=100, pad_id=9))
    assert [batch.ids.shape for batch in batches] == [(3, 100), (3, 64), (2, 16)]
    seen = [number for batch in batches for number in batch.numbers]
    assert sorted(seen) == list(range(8))
    for batch in batches:
        for row, number in enumerate(batch.numbers):
            assert batch.mask[row].sum() == lengths[number]
            np.testing.assert_array_equal(batch.ids[row], np.where(batch.mask[row], 5, 9))
    (one,) = text_batches([[5, 6]] * 5, rows=32, limit=100, pad_id=9)
    assert one.ids.shape == (8, 16)
    np.testing.assert_array_equal(one.mask.sum(axis=1), [2] * 8)  # no row of padding alone


def test_without_sentence_files_the_mean_is_taken(tmp_path):
    encoder, _ = load_encoder(written(tmp_path, {"tokenizer_config.json": {"model_max_length": 9}}))
    assert encoder.pooling == Pooling(("mean",), normalize=False)
    assert encoder.reading.max_tokens == 9


def test_a_transformer_in_a_folder_of_its_own(tmp_path):
    """As older checkpoints have it."""
    inner = written(tmp_path / "0_Transformer", {})
    modules = [{**SENTENCES["modules.json"][0], "path": "0_Transformer"}]
    modules.append(SENTENCES["modules.json"][1])
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    pooling = tmp_path / "1_Pooling" / "config.json"
    for says, modes in (
        ({}, ("mean",)),  # which sentence-transformers takes by itself
        ({"pooling_mode": "max"}, ("max",)),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}, ("max",)),
    ):
        pooling.write_text(json.dumps(says))
        encoder, _ = load_encoder(tmp_path)
        assert encoder == replace(load_encoder(inner)[0], pooling=Pooling(modes))


WRONG_FILES = {
    "a module of another kind": (
        {"modules.json": [*SENTENCES["modules.json"][:2], {"type": "x.models.Dense", "path": "2"}]},
        r"modules.json: expected modules of \('Transformer', 'Pooling', 'Normalize'\), got 'x.models.D",
    ),
    "a folder elsewhere": (
        {"modules.json": [{**SENTENCES["modules.json"][0], "path": "../other"}]},
        r"modules.json: path: expected the name of a folder beside it, got '../other'",
    ),
    "the folder above": (
        {"modules.json": [{**SENTENCES["modules.json"][0], "path": ".."}]},
        r"modules.json: path: expected the name of a folder beside it, got '..'",
    ),
    "two poolings": (
        {"modules.json": [SENTENCES["modules.json"][i] for i in (0, 1, 1)]},
        "modules.json: expected the modules .*, got .'Transformer', 'Pooling', 'Pooling'.",
    ),
    "no pooling": (
        {"modules.json": SENTENCES["modules.json"][:1]},
        "modules.json: expected the modules .*, got .'Transformer',.",
    ),
    "no list": ({"modules.json": {"0": "x"}}, "modules.json: expected JSON of a list, got a dict"),
    "another pooling": (
        {"1_Pooling/config.json": {"pooling_mode_lasttoken": True}},
        "config.json: .*pooling_mode_lasttoken = True: not supported; expected some of",
    ),
    "no flag": (
        {"1_Pooling/config.json": {"pooling_mode_mean_tokens": "yes"}},
        "pooling_mode_mean_tokens: expected true or false, got 'yes'",
    ),
    "nothing": (
        {"1_Pooling/config.json": {"pooling_mode_mean_tokens": False}},
        "1_Pooling.config.json: .*expected one of .* to be true, got none",
    ),
    "a prompt apart": (
        {"1_Pooling/config.json": {"include_prompt": False}},
        "1_Pooling.config.json: .*include_prompt = False: not supported; expected true",
    ),
    "the end is kept": (
        {"tokenizer_config.json": {"truncation_side": "left"}},
        "tokenizer_config.json: truncation_side: expected 'right', got 'left'",
    ),
    "no length": (
        {"sentence_bert_config.json": {"max_seq_length": 0}},
        "sentence_bert_config.json: .*max_seq_length: expected a whole number from 1",
    ),
    "no prompt": (
        {"config_sentence_transformers.json": {"default_prompt_name": "query"}},
        "config_sentence_transformers.json: .*prompts: query: expected a text, got none",
    ),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_sentence_files_that_are_refused(tmp_path, name):
    changed, message = WRONG_FILES[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_encoder(written(tmp_path, {**SENTENCES, **changed}))


def test_arguments_that_are_refused(tmp_path):
    vectors, encoder, params = loaded("distilbert")
    ids = vectors["ids"]
    reading = Reading()
    with pytest.raises(ValueError, match="texts: expected a list of texts, got one text"):
        prepared("a text", reading)
    with pytest.raises(ValueError, match=r"texts\[1\]: expected a text, got int"):
        prepared(["a text", 3], reading)
    with pytest.raises(ValueError, match="encode: expected an encoder with a tokenizer"):
        encoder.encode(params, ["a text"])
    for mask in (np.ones((2, 11), bool), np.zeros((2, 12), np.float32)):
        with pytest.raises(ValueError, match=r"mask: expected 1 for each token .* \(2, 12\), got"):
            encoder.apply(params, ids, mask)
    with pytest.raises(ValueError, match="token_types: expected none, because this model has no"):
        encoder.apply(params, ids, None, np.zeros_like(ids))
    with pytest.raises(
        ValueError, match=r"tokens: expected at most 40 .config.max_length., got 60"
    ):
        encoder.apply(params, np.tile(ids, 5))
    with pytest.raises(
        ValueError, match=r"token_types: expected the ids' shape \(2, 12\), got \(2"
    ):
        loaded("bert")[1].apply(loaded("bert")[2], ids, None, np.zeros((2, 3), np.int32))


# Checkpoints --------------------------------------------------------------------------------------


def test_heads_and_older_names_change_nothing(tmp_path):
    """A checkpoint of BERT's own task: a prefix, a pooler, a head, gamma and beta, numbers of positions."""
    case = case_of("bert")
    theirs = {}
    for name, array in tiny_checkpoint.weights(case).items():
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        theirs["bert." + old.replace("LayerNorm.bias", "LayerNorm.beta")] = array
    theirs["bert.embeddings.position_ids"] = np.arange(40, dtype=np.int64)[None]
    theirs["cls.predictions.bias"] = np.ones(64, np.float32)
    theirs["cls.seq_relationship.weight"] = np.ones((2, 32), np.float32)
    tiny_checkpoint.write(case, tmp_path)
    save_file(theirs, tmp_path / "model.safetensors")
    encoder, params = load_encoder(tmp_path)
    assert encoder.config == loaded("bert")[1].config
    jax.tree.map(np.testing.assert_array_equal, params, loaded("bert")[2])


def test_what_is_missing_or_too_much_is_named(tmp_path):
    case = case_of("modernbert")
    case["shapes"]["layers.0.attn_norm.weight"] = [32]  # which only the other layers have
    del case["shapes"]["layers.2.mlp.Wi.weight"]
    case["shapes"]["layers.1.attn.Wo.weight"] = [32, 31]
    with pytest.raises(ValueError, match="expected no such tensor") as caught:
        load_encoder(tiny_checkpoint.write(case, tmp_path))
    for message in (
        r"layers.0.attn_norm.weight: expected no such tensor, got one of shape (32,)",
        r"model/layers/2/mlp/gate_proj/kernel: expected a tensor for it, got none",
        r"layers.1.attn.Wo.weight: expected shape (32, 32), got (32, 31)",
    ):
        assert message in str(caught.value)


def test_each_kind_of_model_has_its_own_loader(tmp_path):
    encoder_at = tiny_checkpoint.write(case_of("bert"), tmp_path / "encoder")
    decoder_at = tiny_checkpoint.write(tiny_checkpoint.load("gpt2"), tmp_path / "decoder")
    with pytest.raises(
        ValueError,
        match=r"model_type to be one of .*'llama'.*, got 'bert'; this is an encoder of texts: "
        r"sqjax\.models\.load_encoder loads it",
    ):
        load(encoder_at)
    with pytest.raises(
        ValueError,
        match=r"one of \['bert', .*got 'gpt2'; this is a decoder: sqjax\.models\.load loads it",
    ):
        load_encoder(decoder_at)
    with pytest.raises(ValueError, match="this is an encoder of texts"):
        sq.load_quantized(encoder_at)
    with pytest.raises(
        ValueError, match=r"no/such: expected one of .*, or a directory .* got no such"
    ):
        load_encoder("no/such")
    with pytest.raises(ValueError, match=r"load_encoder: expected a dtype of floats"):
        load_encoder(encoder_at, jnp.int8)
    with pytest.raises(
        ValueError, match=r"Family.config_type: expected one of \['DecoderConfig', "
    ):
        replace(NOMIC, config_type=dict)


def config_of(name, **changes):
    return {**case_of(name)["configs"]["4"], **changes}


WRONG = {
    "heads": (
        config_of("bert", num_attention_heads=5),
        "hidden_size: expected a multiple of num_att",
    ),
    "no layers": (config_of("bert", num_hidden_layers=0), "num_hidden_layers: expected a whole"),
    "huge": (config_of("bert", vocab_size=2**31), "vocab_size: expected a whole number from 1"),
    "activation": (config_of("bert", hidden_act="mish"), "hidden_act: expected one of"),
    "relative positions": (
        config_of("bert", position_embedding_type="relative_key"),
        "position_embedding_type = 'relative_key': expected 'absolute'",
    ),
    "a decoder": (config_of("bert", is_decoder=True), "is_decoder = True: expected False"),
    "no positions": (
        config_of("roberta", max_position_embeddings=2),
        "max_position_embeddings: expected more rows than pad_token_id . 1 = 2, .* got 2",
    ),
    "buckets": (
        config_of("mpnet", relative_attention_num_buckets=16),
        "relative_attention_num_buckets: expected 32, got 16",
    ),
    "heads of DistilBERT": (
        config_of("distilbert", n_heads=3),
        "dim: expected a multiple of n_heads = 3, got 32",
    ),
    "window": (config_of("modernbert", local_attention=0), "local_attention: expected a whole"),
    "every 0": (
        config_of("modernbert", global_attn_every_n_layers=0),
        "global_attn_every_n_layers: expected a whole number from 1",
    ),
    "very many layers": (
        config_of("modernbert", num_hidden_layers=2**31 - 1),
        "num_hidden_layers: expected a whole number of layers from 1 to 10000",
    ),
    "no text": (config_of("modernbert", hidden_activation=3), "hidden_activation: expected one of"),
    "rope": (
        config_of("modernbert", rope_scaling={"rope_type": "spiral"}),
        "rope_type = 'spiral': not supported",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_configurations_that_are_refused(case):
    config, message = WRONG[case]
    with pytest.raises(ValueError, match=f"config.json(.|\n)*{message}"):
        read_config(config, config_type=EncoderConfig)


def test_configurations_by_hand_that_are_refused():
    with pytest.raises(ValueError, match=r"EncoderConfig\.hidden_size: expected a multiple of"):
        EncoderConfig(64, 32, 48, 2, 5)
    with pytest.raises(ValueError, match=r"EncoderConfig\.kinds: expected one LayerKind for all"):
        EncoderConfig(64, 32, 48, 3, 4, kinds=(f.LayerKind(), f.LayerKind()))
    with pytest.raises(ValueError, match=r"EncoderConfig\.block: expected one of \('sum', 'pre'\)"):
        EncoderConfig(64, 32, 48, 2, 4, block="parallel")
    with pytest.raises(ValueError, match=r"EncoderConfig\.distance_buckets: expected a multiple"):
        EncoderConfig(64, 32, 48, 2, 4, distance_buckets=3)
    with pytest.raises(ValueError, match=r"EncoderConfig\.max_length: expected a whole number"):
        EncoderConfig(64, 32, 48, 2, 4, max_length=2**31 - 1, position_offset=2)
    config = EncoderConfig(64, 32, 48, 2, 4).layers
    with pytest.raises(ValueError, match=r"LayerKind\.both_ways: expected false in a decoder"):
        jax.eval_shape(sq.models.Model(config).init, jax.random.key(0))


def test_every_family_is_one_of_these():
    known = {name for name, family in FAMILIES.items() if family.config_type is EncoderConfig}
    tested = {case_of(name)["model_type"] for name in CASES} - {"nomic_bert"}
    assert known == tested


@pytest.mark.parametrize("name", slow_but(["mpnet", "modernbert"], "mpnet"))
def test_everything_is_computed_in_the_parameters_dtype(name):
    vectors, encoder, params = loaded(name)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    arguments = half, vectors["padded_ids"], vectors["mask"]
    assert jax.eval_shape(encoder.apply, *arguments).dtype == jnp.bfloat16
    assert jax.eval_shape(encoder.embed, *arguments) == jax.ShapeDtypeStruct((2, 32), jnp.bfloat16)


# Smoothing and int8 -------------------------------------------------------------------------------

#: {case: (groups in each layer, in layer 0)}. After BERT's norms comes the residual stream, which
#: nothing may scale, and GELU is in the way after `up_proj`: there values and output are left.
GROUPS = {"bert": (1, 1), "mpnet": (1, 1), "modernbert": (4, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mpnet", "bert", "modernbert"])
def test_the_groups_that_fold_and_int8(name):
    vectors, encoder, params = loaded(name)
    batch = vectors["padded_ids"], vectors["mask"]
    stats = sq.calibrate(encoder.apply, params, [batch], mask=lambda ids, mask: mask)
    layers = encoder.config.num_layers
    in_layer, in_first = GROUPS[name]
    assert len(stats.graph.groups) == in_first + in_layer * (layers - 1)
    real = vectors["mask"] == 1
    expected = vectors["padded_states"]
    scales = sq.scales(params, stats, 0.5)
    smoothed = sq.fold(params, stats.graph, scales)
    assert_close(np.asarray(jax.jit(encoder.apply)(smoothed, *batch))[real], expected)
    rules = {"self_attn": sq.W8A8_O1, ".*": sq.W8A8_O3}
    qparams = sq.quantize(smoothed, sq.fold_stats(stats, scales), rules)
    run = jax.jit(sq.quantized(encoder.apply))
    assert int8_dots(run, qparams, *batch) == len(stats.graph.sites)
    got = np.asarray(run(qparams, *batch))[real]
    error = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
    assert 0 < error < 0.1


def int8_dots(run, *arguments):
    """How many matmuls multiply int8 by int8."""
    dots = [e for e in jaxprs.equations(jaxprs.of(run, *arguments)) if "dot" in e.primitive.name]
    both = [{v.aval.dtype for v in e.invars[:2]} for e in dots]
    return sum(dtypes == {jnp.dtype(jnp.int8)} for dtypes in both)


def small():
    """(an encoder of one small layer, the shapes of its parameters, ids)."""
    encoder = Encoder(EncoderConfig(32, 16, 32, 1, 2, max_length=16))
    shapes = jax.eval_shape(encoder.init, jax.random.key(0))
    return encoder, shapes, np.arange(1, 13, dtype=np.int32)[None]


def test_what_is_found_in_a_layer():
    encoder, shapes, ids = small()
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    graph = graph_of(encoder.apply, params, ids)
    assert len(graph.sites) == 6
    (group,) = graph.groups
    assert group.name == "model/layers/0/self_attn/o_proj/kernel"


@pytest.mark.slow
def test_quantized_texts_are_near(tmp_path):
    """`encode` runs quantized parameters as they are, here of W8A8 in all six matmuls."""
    found, _ = load_encoder(written(tmp_path, SENTENCES))
    encoder, _, ids = small()
    params = jax.jit(encoder.init)(jax.random.key(0))
    stats = sq.calibrate(encoder.apply, params, [ids])
    qparams = sq.quantize(params, stats, sq.W8A8)
    assert int8_dots(sq.quantized(encoder.embed), qparams, ids) == 6
    encoder = replace(encoder, tokenizer=found.tokenizer)
    texts = ["a b c", "x"]
    expected = encoder.encode(params, texts)
    error = np.abs(encoder.encode(qparams, texts) - expected).max()
    assert 0 < error < 0.05 * np.abs(expected).max()


@pytest.mark.slow
def test_a_stack_is_the_layers_apart():
    vectors, encoder, params = loaded("roberta")
    batch = vectors["padded_ids"], vectors["mask"]
    apart = jax.jit(encoder.embed)(params, *batch)
    remat = replace(encoder, remat=True)
    assert_close(jax.jit(remat.embed)(stack_layers(params), *batch), apart)


def test_a_real_one_by_the_names_it_has(monkeypatch):
    asked = []
    monkeypatch.setitem(
        encoders.ENCODER_NAMES, "all-minilm-l6-v2", lambda: asked.append(1) or Path("no")
    )
    for name in ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"):
        with pytest.raises(ValueError, match="got no such directory"):
            load_encoder(name)
    assert len(asked) == 2


def test_positions_skip_the_id_of_padding():
    """As transformers counts them: by the ids, with a mask or without."""
    config = EncoderConfig(32, 8, 16, 1, 2, skips_padding=True, pad_id=3, position_offset=4)
    ids = jnp.asarray([[3, 3, 5, 6, 7], [5, 3, 6, 7, 3]])
    rows = np.array([[3, 3, 4, 5, 6], [4, 3, 5, 6, 3]])
    expected = np.where(np.asarray(ids) == 3, -1, np.cumsum(np.asarray(ids) != 3, axis=1) - 1) + 4
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(places(config, ids) + 4, rows)


def test_padding_that_is_no_token():
    with pytest.raises(
        ValueError, match=r"pad_id: expected a token id below vocab_size = 32, got 40"
    ):
        EncoderConfig(32, 8, 16, 1, 2, pad_id=40)
    values = {**case_of("bert")["configs"]["4"], "pad_token_id": 100000}
    with pytest.raises(ValueError, match=r"below vocab_size = .*got 100000 \(from pad_token_id\)"):
        read_config(values, config_type=EncoderConfig)
