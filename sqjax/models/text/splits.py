"""How byte-level tokenizers split a text into words before they merge, as data.

A GGUF file says by a name (`tokenizer.ggml.pre`) what a tokenizer.json spells out. Each expression
stands here once. They are those of the models' own tokenizer.json.
"""

from typing import NamedTuple

#: Kinds of steps, each of which goes on with the pieces of the one before.
SPLIT = "split"  # what an expression matches stands alone
DIGITS = "digits"  # each digit stands alone
NUMBERS = "numbers"  # each run of digits stands alone
PUNCTUATION = "punctuation"  # each run of punctuation stands alone
#: Each byte becomes a letter. It is the last step, unless it stands elsewhere.
BYTES = "bytes"

Steps = tuple[tuple[str, str], ...]


class Splits(NamedTuple):
    """How a text is split.

    Attributes:
        steps: (kind, expression) each; only `SPLIT` has an expression.
        composes: whether accents are composed with their letters before (Unicode's form NFC).
        whole_words: whether a word that is a token is taken whole, without regard to merges.
        begins: whether a token begins every text, where a file does not say.
    """

    steps: Steps
    composes: bool = False
    whole_words: bool = False
    begins: bool = False


# Expressions ------------------------------------------------------------------------------------

_GPT2 = "|".join(
    (
        "'s|'t|'re|'ve|'m|'ll|'d",
        r" ?\p{L}+| ?\p{N}+",
        r" ?[^\s\p{L}\p{N}]+",
        r"\s+(?!\S)|\s+",
    )
)

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_ONE, _UP_TO_THREE = r"\p{N}", r"\p{N}{1,3}"

_QWEN2 = "|".join((_ENDINGS, _WORD, _ONE, _SYMBOLS, _SPACES))
_LLAMA3 = "|".join((_ENDINGS, _WORD, _UP_TO_THREE, _SYMBOLS, _SPACES))

# Words in which a small letter begins no new part: "HelloWorld" is split, "hello" is not.
_LARGE = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SMALL_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{_LARGE}*{_SMALL}+"
_LARGE_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{_LARGE}+{_SMALL}*"
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = "|".join((_SMALL_WORD, _LARGE_WORD, _ONE, _PATHS, _SPACES))
_GPT4O = "|".join(
    (
        f"{_SMALL_WORD}{_ENDINGS}?",
        f"{_LARGE_WORD}{_ENDINGS}?",
        _UP_TO_THREE,
        _PATHS,
        _SPACES,
    )
)

_HAN = "[一-龥぀-ゟ゠-ヿ]+"
_DEEPSEEK3 = "|".join(
    (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r" ?[\p{P}\p{S}]+[\r\n]*",
        _SPACES,
    )
)
_HAN_AND_HANGUL = "[一-龥ࠀ-一가-퟿]+"
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"

# What llama.cpp does where it does not know a tokenizer.
_OTHER_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
_THREE = "[0-9][0-9][0-9]"

# Names ------------------------------------------------------------------------------------------

_WORDS = ((SPLIT, _GPT2),)
_DIGITS_AND_WORDS = ((DIGITS, ""), *_WORDS)

GPT2 = Splits(_WORDS)
QWEN2 = Splits(((SPLIT, _QWEN2),), composes=True)
LLAMA3 = Splits(((SPLIT, _LLAMA3),), whole_words=True, begins=True)
GPT4O = Splits(((SPLIT, _GPT4O),))
BLOOM = Splits(((SPLIT, _BLOOM),))

#: {tokenizer.ggml.pre: how it splits}. Absent names are refused.
BY_NAME = {
    "gpt-2": GPT2,
    "phi-2": GPT2,
    "olmo": Splits(_WORDS, composes=True),
    "mpt": Splits(_WORDS, composes=True),
    "smollm": Splits(_DIGITS_AND_WORDS),
    "starcoder": Splits(_DIGITS_AND_WORDS),
    "refact": Splits(_DIGITS_AND_WORDS),
    "command-r": Splits(_DIGITS_AND_WORDS, composes=True),
    # Its digits are found among the letters that stand for bytes, some of which are digits.
    "falcon": Splits(
        (
            (PUNCTUATION, ""),
            *_WORDS,
            (BYTES, ""),
            (NUMBERS, ""),
            (SPLIT, _THREE),
        )
    ),
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "falcon3": LLAMA3,
    "dbrx": Splits(((SPLIT, _LLAMA3),)),
    "smaug-bpe": Splits(((SPLIT, _LLAMA3),)),
    "glm4": Splits(((SPLIT, _LLAMA3),)),
    "chatglm-bpe": Splits(((SPLIT, _LLAMA3),)),
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "tekken": Splits(((SPLIT, _TEKKEN),), whole_words=True, begins=True),
    "gpt-4o": GPT4O,
    "llama4": GPT4O,
    "deepseek-v3": Splits(
        ((SPLIT, _UP_TO_THREE), (SPLIT, _HAN), (SPLIT, _DEEPSEEK3))
    ),
    "deepseek-coder": Splits(
        (
            (SPLIT, r"[\r\n]"),
            (SPLIT, r"\s?\p{L}+"),
            (SPLIT, r"\s?\p{P}+"),
            (SPLIT, _HAN_AND_HANGUL),
            (DIGITS, ""),
        )
    ),
    "bloom": BLOOM,
    "poro-chat": BLOOM,
    "gpt3-finnish": BLOOM,
    "default": Splits(
        (
            (SPLIT, _OTHER_PUNCTUATION),
            *_WORDS,
            (SPLIT, r"\p{N}+"),
            (SPLIT, _THREE),
        )
    ),
}
