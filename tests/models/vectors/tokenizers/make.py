"""Makes the reference vectors beside this file, with transformers, sentencepiece and `regex`.

    pip install "transformers>=4.57,<5" sentencepiece protobuf jinja2 regex
    python tests/models/vectors/tokenizers/make.py

Every tokenizer is tiny and trained here (two of the trainers break ties anew each time). The ids, the texts and the
conversations are what the reference makes of them.
"""

import base64
import io
import json
import tempfile
from pathlib import Path

import regex
import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

HERE = Path(__file__).parent

CORPUS = [
    "The capital of France is Paris, and the capital of Germany is Berlin.",
    "Die Straße hat schöne Häuser, und der Fluss fließt durch die Stadt. Über der Stadt ist der Himmel.",
    "def function(x):\n    return x ** 2  # the square\n\n\nclass Thing:\n    pass\n",
    "I'm sure they'll say it's fine; he's been there for 12345 years, and we've 3.14 of them!",
    "Models that were trained on text continue the text: the model continues, and continues, and continues.",
    "  leading and  double   spaces   are text too",
] * 4

TEXTS = [
    "The capital of France is Paris.",
    "Die Straße hat schöne Häuser, und der Fluss fließt.",
    "def f(x):\n    return x ** 2  # squares\n",
    "I'm sure THEY'LL say it's fine; he's 12345 years, 3.14!",
    "  leading and  double   spaces ",
    "😀 emoji 👩‍👩‍👧 and 日本語 ひらがな",
    "",
    "\n\n\ttabs\r\nand lines\n \n",
    "e\u0301 combined é, ﬁ ligature, Ⅳ and HelloWorld/path/to",
    "<s>special</s> <0x41> <|end|> text",
]


def write(name, content):
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    (HERE / f"{name}.json").write_text(text + "\n")
    print(f"{name}: {len(text) / 1e3:.1f} kB")


# tokenizer.json ---------------------------------------------------------------------------------


def directory_vector(name, backend, config):
    """A directory as transformers reads it: its files, and what is made of the texts."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        backend.save(str(folder / "tokenizer.json"), pretty=False)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        reference = AutoTokenizer.from_pretrained(folder)
        ids = [reference(text)["input_ids"] for text in TEXTS]
        files = {
            "tokenizer.json": json.loads((folder / "tokenizer.json").read_text()),
            "tokenizer_config.json": config,
        }
        decoded = [reference.decode(row, skip_special_tokens=True) for row in ids]
        names = ("bos", "eos", "pad")
        special = {key: getattr(reference, f"{key}_token_id") for key in names}
    write(
        name, {"files": files, "texts": TEXTS, "ids": ids, "decoded": decoded, "special": special}
    )


def trained(model, trainer, normalizer=None, pre_tokenizer=None, decoder=None):
    backend = Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoder
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def byte_level(split, normalizer=None, special=("<|begin|>", "<|end|>"), **model):
    return trained(
        models.BPE(**model),
        trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=list(special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
        normalizer,
        split,
        decoders.ByteLevel(),
    )


def split_then_bytes(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


LLAMA3 = TikTokenConverter.__init__.__defaults__[1]
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def directories():
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    ends = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    directory_vector("gpt2", byte_level(plain), {**config, **ends})

    backend = byte_level(split_then_bytes(LLAMA3), ignore_merges=True)
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    directory_vector("llama3", backend, {**config, **ends})

    backend = byte_level(split_then_bytes(QWEN2), normalizers.NFC())
    directory_vector("qwen2", backend, {**config, **ends, "pad_token": "<|begin|>"})

    sequence = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    special = ["<unk>", "<s>", "</s>"]
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    backend = trained(
        models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True),
        trainers.BpeTrainer(vocab_size=480, special_tokens=special + BYTES, show_progress=False),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
        decoders.Sequence([*sequence, decoders.Strip(" ", 1, 0)]),
    )
    backend = without_added(backend, BYTES)
    llama = {
        "tokenizer_class": "LlamaTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": True,
        "legacy": False,
    }
    directory_vector("llama2", backend, {**config, **named, **llama})

    gemma = ["<pad>", "<eos>", "<bos>", "<unk>"]
    backend = trained(
        models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True),
        trainers.BpeTrainer(vocab_size=480, special_tokens=gemma + BYTES, show_progress=False),
        normalizers.Replace(" ", "▁"),
        pre_tokenizers.Split(" ", "merged_with_previous"),
        decoders.Sequence(sequence),
    )
    backend = without_added(backend, BYTES)
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    named = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    directory_vector("gemma", backend, {**config, **named, "tokenizer_class": "GemmaTokenizerFast"})

    backend = trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=200,
            special_tokens=["<pad>", "</s>", "<unk>"],
            unk_token="<unk>",
            show_progress=False,
        ),
        normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]),
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        decoders.Metaspace(prepend_scheme="always"),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    named = {
        "unk_token": "<unk>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "pad_token": "<pad>",
    }
    decoder = {
        "3": {
            "content": "<extra>",
            "lstrip": False,
            "normalized": False,
            "rstrip": True,
            "single_word": False,
            "special": True,
        }
    }
    backend.add_special_tokens([AddedToken("<extra>", rstrip=True)])
    decoder = {str(backend.token_to_id("<extra>")): decoder["3"]}
    directory_vector(
        "t5",
        backend,
        {**config, **named, "added_tokens_decoder": decoder, "clean_up_tokenization_spaces": True},
    )

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend = trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False),
        normalizers.BertNormalizer(lowercase=True),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(cleanup=False),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    named = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    directory_vector("bert", backend, {**config, **named, "clean_up_tokenization_spaces": True})


def without_added(backend, tokens):
    """The tokens of bytes are ordinary ones: no text is cut by their spelling."""
    content = json.loads(backend.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in tokens]
    return Tokenizer.from_str(json.dumps(content))


# tokenizer.model --------------------------------------------------------------------------------


def kind_of(sp, i):
    """What a token is, as sentencepiece numbers it; a symbol of the user's looks like a normal one."""
    tests = {2: sp.is_unknown, 3: sp.is_control, 6: sp.is_byte, 5: sp.is_unused}
    return next((kind for kind, holds in tests.items() if holds(i)), 1)


def as_llama(model):
    """What transformers makes of a directory with tokenizer.model alone: {legacy: {text: ids}}."""
    texts = [*TEXTS, "a<tool>b", " x</s>y <s>z"]
    found = {}
    for legacy in (True, False):
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "tokenizer.model").write_bytes(model)
            (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config))
            reference = AutoTokenizer.from_pretrained(folder)
        found[json.dumps(legacy)] = {text: reference(text)["input_ids"] for text in texts}
    return found


def sentencepieces():
    """Models that sentencepiece trained, and its own ids; special tokens have no text there."""
    rules = HERE / "rules.tsv"
    rules.write_text("FB01\t66 69\n9\t20\nA\t20\nD\t20\n65 301\tE9\n2163\t49 56\n")
    kinds = {
        "spm_bpe": {
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            "split_digits": True,
            "vocab_size": 420,
            "user_defined_symbols": ["<tool>", "▁▁"],
        },
        "spm_unigram": {
            "model_type": "unigram",
            "normalization_rule_tsv": str(rules),
            "vocab_size": 160,
            "hard_vocab_limit": False,
            "pad_id": 0,
            "eos_id": 1,
            "unk_id": 2,
            "bos_id": -1,
        },
    }
    texts = [text for text in TEXTS if "<s>" not in text]
    for name, settings in kinds.items():
        model = io.BytesIO()
        sentences = [line for text in CORPUS for line in text.split("\n") if line]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, minloglevel=2, **settings
        )
        sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        ids = [sp.encode(text) for text in texts]
        symbols = settings.get("user_defined_symbols", ())
        pieces = []
        for i in range(sp.get_piece_size()):
            text = sp.id_to_piece(i)
            pieces.append([text, sp.get_score(i), 4 if text in symbols else kind_of(sp, i)])
        content = {
            "model": base64.b64encode(model.getvalue()).decode(),
            "pieces": pieces,
            "texts": texts,
            "ids": ids,
            "decoded": [sp.decode(row) for row in ids],
        }
        if name == "spm_bpe":
            content["as_llama"] = as_llama(model.getvalue())
        write(name, content)
    rules.unlink()


# How names of GGUF split ------------------------------------------------------------------------

ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES_TO_LETTERS = "bytes to letters"
#: {name: expressions one after the other, each of whose matches stands alone}.
EXPRESSIONS = {
    "gpt-2": [WORDS],
    "smollm": [r"\p{N}", WORDS],
    "llama-bpe": [LLAMA3],
    "qwen2": [QWEN2],
    "falcon": [r"[\p{P}$+<=>^`|~]+", WORDS, BYTES_TO_LETTERS, r"\p{N}+", "[0-9][0-9][0-9]"],
    "tekken": [CASED % ("", "") + r"|\p{N}|" + REST],
    "gpt-4o": [CASED % (ENDINGS + "?", ENDINGS + "?") + r"|\p{N}{1,3}|" + REST],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
    "deepseek-coder": [
        r"[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}",
    ],
    "bloom": [r" ?[^(\s|.,!?…。，、।۔،)]+"],
    "default": [r"[\p{P}$+<=>^~|]+", WORDS, r"\p{N}+", "[0-9][0-9][0-9]"],
}


def letters():
    """{byte: the letter that stands for it}: itself where it prints, otherwise one from 256 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


def as_letters(text):
    return "".join(letters()[byte] for byte in text.encode())


def split(text, expressions):
    """The pieces, bytes as letters."""
    pieces = [text] if text else []
    if BYTES_TO_LETTERS not in expressions:
        expressions = [*expressions, BYTES_TO_LETTERS]
    for expression in expressions:
        if expression == BYTES_TO_LETTERS:
            pieces = [as_letters(piece) for piece in pieces]
        else:
            pieces = [part for piece in pieces for part in isolated(piece, expression)]
    return pieces


def isolated(text, expression):
    found, at = [], 0
    for match in regex.finditer(expression, text):
        found += [text[at : match.start()], match.group()]
        at = match.end()
    return [piece for piece in [*found, text[at:]] if piece]


def splits():
    texts = [
        *TEXTS,
        "x²+½ = ٣٤ 1234567 don't DON'T l'été `a` <b> c_d",
        "多 字节 Übergrößenträger CamelCaseWords SQL",
    ]
    pieces = {name: [split(text, found) for text in texts] for name, found in EXPRESSIONS.items()}
    write("splits", {"texts": texts, "pieces": pieces})


# Chats ------------------------------------------------------------------------------------------

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "blocks": (
        "{{- bos_token }}\n{%- set ns = namespace(count=0) %}\n"
        "{%- for message in messages %}\n    {%- if message.role == 'system' %}{% continue %}{% endif %}\n"
        "    {%- set ns.count = ns.count + 1 %}\n    {%- if ns.count > 3 %}{% break %}{% endif %}\n"
        "    {% generation %}{{ '[' ~ ns.count ~ '] ' ~ message.content | trim }}{% endgeneration %}\n\n"
        "{%- endfor %}\n  {% if documents is defined %}\n  D\n  {% endif %}\n{{ eos_token }}{{ pad_token }}"
    ),
    "tools": (
        "{% if tools %}{% for tool in tools %}{{ tool | tojson }}|{{ tool | tojson(indent=2) }}\n{% endfor %}{% endif %}"
        "{{ strftime_now('a day') }} {% if thinking is defined and thinking %}<think>{% endif %}"
        "{% for message in messages %}{% if message.tool_calls %}{{ message.tool_calls | tojson }}"
        "{% elif message.content is string %}{{ message.content }}{% else %}"
        "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
    ),
    "strict": (
        "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}[INST] {{ message['content'] }} [/INST]{{ eos_token }}{% endfor %}"
    ),
}
TOOL = {"type": "function", "function": {"name": "größe", "parameters": {"x": "<int> & 'y'"}}}
CHATS = {
    "one": {"messages": [{"role": "user", "content": "Hi"}]},
    "three": {
        "messages": [
            {"role": "user", "content": " Wie geht's? "},
            {"role": "assistant", "content": "Gut, <b>danke</b>!"},
            {"role": "user", "content": "日本\n"},
        ]
    },
    "system": {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "add_generation_prompt": False,
    },
    "tool": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "part 1, "},
                    {"type": "text", "text": "part 2"},
                ],
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"name": "größe", "arguments": {"x": 1}}],
            },
        ],
        "tools": [TOOL],
        "thinking": True,
    },
}
PAIRS = [
    ("chatml", "one"),
    ("chatml", "three"),
    ("chatml", "system"),
    ("blocks", "three"),
    ("blocks", "system"),
]
PAIRS += [("tools", "one"), ("tools", "tool"), ("strict", "one"), ("strict", "three")]


def chats():
    reference = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>"
    )
    rows = []
    for template, chat in PAIRS:
        arguments = {"add_generation_prompt": True, **CHATS[chat]}
        messages = arguments.pop("messages")
        text = reference.apply_chat_template(
            messages, chat_template=TEMPLATES[template], tokenize=False, **arguments
        )
        rows.append([template, chat, text])
    write("chats", {"templates": TEMPLATES, "chats": CHATS, "rendered": rows})


if __name__ == "__main__":
    directories()
    sentencepieces()
    splits()
    chats()
