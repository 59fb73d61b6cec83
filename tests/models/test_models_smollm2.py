"""SmolLM2-135M-Instruct, a real model (downloaded if not in the cache).

Every test here is slow, and what it covers in general is covered in other files on tiny models.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from real_models import first_layers, smollm2
from scipy.special import logsumexp

from sqjax.commands.shared import shipped, text_windows
from sqjax.models import generate, greedy, prefix, stack_layers, token_peaks
from sqjax.models.evaluation.perplexity import perplexity


@pytest.fixture(scope="module")
def loaded():
    return smollm2()


def encode(model, text):
    return jnp.asarray([model.tokenizer.encode(text)])


@pytest.mark.slow
def test_tokenizer_of_the_real_model(loaded):
    tokenizer = loaded[0].tokenizer
    assert tokenizer.encode("abc 123") == [25276, 216, 33, 34, 35]
    assert tokenizer.eos_id == 2
    assert tokenizer.encode("<|im_end|>") == [2]
    text = "Naïve café: 1,024 ≥ 512 — “quoted”\n\tdef f(x): return x"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
def test_chat_of_the_real_model(loaded):
    """The template in the file, rendered here and by transformers."""
    tokenizer = loaded[0].tokenizer
    user = {"role": "user", "content": "Hi"}
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    text = tokenizer.chat([user])
    assert text == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend,
        chat_template=tokenizer.templates.named["default"].text,
    )
    for messages in ([user], [{"role": "system", "content": "Be brief."}, user, user]):
        expected = reference.apply_chat_template(messages, tokenize=False)
        assert tokenizer.chat(messages, add_generation_prompt=False) == expected
        ids = reference.apply_chat_template(messages, add_generation_prompt=True)
        assert tokenizer.encode_chat(messages) == list(ids)


@pytest.mark.slow
@pytest.mark.every_case  # it could not continue as in torch, below, if it did not
def test_real_model_predicts_text(loaded):
    model, params = loaded
    ids = encode(
        model,
        "Water boils at one hundred degrees, and the Earth takes 365 days to go around the Sun.",
    )
    logits = np.asarray(jax.jit(model.apply)(stack_layers(params), ids))[0, :-1]
    loss = np.mean(logsumexp(logits, -1) - logits[np.arange(len(logits)), ids[0, 1:]])
    assert 1 < loss < 4  # chance is log(49152) = 10.8


#: The 20 greedy tokens that torch 2.13 and transformers 4.57 find after each prompt, in float32, one prompt at a time,
#: from the weights that transformers' own reader of GGUF makes of the same file.
CONTINUATIONS = [
    (
        "The capital of France is",
        "7042 30 198 198 504 2988 314 42 216 34 32 33 40 29 32 33 29 34 34 216",
    ),
    (
        "Once upon a time, there was a small",
        "3102 32047 281 260 1911 282 253 14055 2240 30 378 3102 436 1343 327 624 8685 6600 284 11908",
    ),
    (
        "def fibonacci(n):",
        "472 585 304 1758 216 32 42 448 1003 216 33 472 1003 304 1672 3987 46477 24 94 731",
    ),
    (
        "<|im_start|>user\nWhat color is the sky?<|im_end|>\n<|im_start|>assistant\n",
        "504 6376 314 253 3953 11615 282 4461 30 2 198 2 1 9690 198 2 198 1 4093 198",
    ),
    (
        "Water boils at",
        "216 33 32 32 4742 51 28 527 314 253 3468 20590 30 198 198 504 6714 282 260 2817",
    ),
    (
        "The three primary colours are",
        "260 3003 14797 282 260 1205 3323 42 2382 28 4461 28 284 5724 30 1216 359 260 805 1296",
    ),
    (
        "To make a good cup of tea, first",
        "346 737 288 25456 357 30 198 198 504 808 1833 314 288 25456 253 1123 7118 282 7188 30",
    ),
    (
        "In 1969, the first",
        "655 253 4263 436 9069 288 260 2038 4699 282 21912 30 198 198 504 216 34 32 34 34",
    ),
    (
        "<|im_start|>user\nName five animals.<|im_end|>\n<|im_start|>assistant\n",
        "33 30 450 438 198 34 30 23515 1260 198 35 30 450 438 198 36 30 23515 1260 198",
    ),
    (
        "2, 4, 6, 8,",
        "216 33 32 28 216 33 34 28 216 33 36 28 216 33 38 28 216 33 40 28",
    ),
]


@pytest.mark.slow
def test_ten_prompts_continue_as_in_torch(loaded):
    """In one batch of unequal prompts, in chunks of the prefill; one program of all layers."""
    model, params = loaded
    stacked = stack_layers(params)
    got = generate(model, stacked, [prompt for prompt, _ in CONTINUATIONS], 10, stop=(), chunk=8)
    assert got.tokens == [[int(i) for i in ids.split()[:10]] for _, ids in CONTINUATIONS]


@pytest.mark.slow
@pytest.mark.every_case
def test_one_prompt_continues_in_english_as_in_torch(loaded):
    """`greedy`, whose program is its own."""
    model, params = loaded
    prompt, ids = CONTINUATIONS[3]
    got = np.asarray(greedy(model, params, encode(model, prompt), 16)[0]).tolist()
    assert got == [int(i) for i in ids.split()][:16]
    answer = model.tokenizer.decode(got)
    assert "sky" in answer
    assert "blue" in answer
    assert model.tokenizer.decode([int(i) for i in CONTINUATIONS[0][1].split()][:2]) == " Paris."


@pytest.mark.slow
@pytest.mark.every_case
def test_a_quantized_cache_on_the_real_model(loaded):
    """Teacher-forced perplexity through the cache: int8 within 0.5%, int4 within 3%."""
    model, params = loaded
    text = shipped("evaluation")
    ids = model.tokenizer.encode(text)[:256]
    plain = perplexity(model, params, ids, 128)
    for name, bound, nbytes in (("int8", 0.005, 12240), ("int4", 0.03, 7920)):
        got = perplexity(model, params, ids, 128, cache=name, chunk=64)
        assert 1e-5 < abs(got / plain - 1) < bound
        assert model.init_cache(1, 4, kind=name).bytes_per_token == nbytes


@pytest.mark.slow
def test_no_token_stands_out_behind_the_prefix(loaded):
    """Behind the opening token alone the first one does in a few texts."""
    model, params = first_layers(*loaded, 12)  # of them the eleventh makes a token stand out
    # The windows of the evaluation text whose first token does, and three others.
    evaluated = text_windows(model, "evaluation", 512, 60)
    texts = jnp.asarray(evaluated[[13, 28, 29, 49, 54, 0, 1, 2], :16])
    chosen = prefix(model, params, [jnp.asarray(text_windows(model, "calibration", 128, 2))])
    assert len(chosen.ids) == 2
    opening = prefix(model, params, ids=chosen.ids[-1:])
    peaks = [np.asarray(token_peaks(model, params, texts, p)) for p in (opening, chosen)]
    assert (peaks[0][:, 0] > 64).sum() == 5
    assert peaks[1].max() < 32
