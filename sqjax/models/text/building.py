"""Builds tokenizers of the `tokenizers` package from their parts: tokens, merges, scores."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sqjax.models.text.packages import tokenizers_package
from sqjax.models.text.splits import (
    BYTES,
    DIGITS,
    NUMBERS,
    PUNCTUATION,
    SPLIT,
    Splits,
)

#: Kinds of tokens, as sentencepiece and GGUF number them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

#: The sign that stands for a space.
SPACE = "\u2581"


class Piece(NamedTuple):
    """A token of a sentencepiece model: its text, its score and its kind."""

    text: str
    score: float
    kind: int


class Pieces(NamedTuple):
    """A sentencepiece model.

    Attributes:
        pieces: its tokens.
        merges: whether it merges pairs, the best first (BPE); otherwise it takes the likeliest
            split of all (Unigram).
        unknown: the id of the token for what is unknown.
        bytes_for_unknown: whether what is unknown becomes the tokens of its bytes.
        prefix: whether a space is put before every text.
        one_space: whether several spaces count as one, and those at the ends as none.
        prefix_once: whether that space is put at the start only, if there is none, and not after
            special tokens too.
        characters: a table of replaced characters, as sentencepiece compiles it; b"" for none.
    """

    pieces: Sequence[Piece]
    merges: bool
    unknown: int
    bytes_for_unknown: bool
    prefix: bool
    one_space: bool = False
    prefix_once: bool = False
    characters: bytes = b""


def pair(merge: str) -> tuple[str, str]:
    """The two tokens of a merge, which files write with a space between: "ab c" is "ab" and "c"."""
    left, _, right = merge.partition(" ")
    return left, right


def byte_level(
    vocabulary: dict[str, int],
    merges: Sequence[tuple[str, str]],
    splits: Splits,
    prefix: bool = False,
) -> Any:
    """A byte-level tokenizer, as GPT-2's: its tokens are runs of bytes, each shown as a letter.

    Args:
        vocabulary: {token: id}.
        merges: pairs of tokens that are merged, the first ones first.
        splits: how a text is split before.
        prefix: whether a space is put before every text that begins with none.
    """
    package = tokenizers_package()
    model = package.models.BPE(
        vocab=vocabulary,
        merges=list(merges),
        ignore_merges=splits.whole_words,
    )
    backend = package.Tokenizer(model)
    found = package.normalizers
    steps = [found.NFC()] if splits.composes else []
    if prefix:
        two_first = package.Regex(r"\A  ")
        steps += [found.Prepend(" "), found.Replace(two_first, " ")]
    if steps:
        backend.normalizer = found.Sequence(steps)
    backend.pre_tokenizer = _pre_tokenizer(package, splits)
    backend.decoder = package.decoders.ByteLevel()
    return backend


def _pre_tokenizer(package: Any, splits: Splits) -> Any:
    """The steps of a split."""
    found = package.pre_tokenizers
    makers = {
        SPLIT: lambda regex: found.Split(package.Regex(regex), "isolated"),
        DIGITS: lambda _: found.Digits(individual_digits=True),
        NUMBERS: lambda _: found.Digits(individual_digits=False),
        PUNCTUATION: lambda _: found.Punctuation(behavior="contiguous"),
        BYTES: lambda _: found.ByteLevel(
            add_prefix_space=False, use_regex=False
        ),
    }
    last = () if (BYTES, "") in splits.steps else ((BYTES, ""),)
    return found.Sequence(
        [makers[kind](regex) for kind, regex in (*splits.steps, *last)]
    )


def sentencepiece(model: Pieces) -> Any:
    """A tokenizer as sentencepiece's, in which a sign stands for each space.

    There is no split into words before: a piece may hold several.
    """
    package = tokenizers_package()
    make = _by_merges if model.merges else _by_likelihood
    backend = package.Tokenizer(make(package, model))
    backend.normalizer = _normalizer(package, model)
    if model.prefix_once:
        backend.pre_tokenizer = package.pre_tokenizers.Metaspace(
            prepend_scheme="first" if model.prefix else "never", split=False
        )
    backend.decoder = _decoder(package, model)
    return backend


def _by_merges(package: Any, model: Pieces) -> Any:
    return package.models.BPE(
        vocab={piece.text: i for i, piece in enumerate(model.pieces)},
        merges=merges_by_score(model.pieces),
        unk_token=model.pieces[model.unknown].text,
        fuse_unk=True,
        byte_fallback=model.bytes_for_unknown,
    )


def _by_likelihood(package: Any, model: Pieces) -> Any:
    return package.models.Unigram(
        vocab=[(piece.text, piece.score) for piece in model.pieces],
        unk_id=model.unknown,
        byte_fallback=model.bytes_for_unknown,
    )


class _Merge(NamedTuple):
    """A pair that makes a token, and that token's score."""

    left: str
    right: str
    score: float


def _rank(merge: _Merge) -> tuple[float, int, int]:
    return merge.score, len(merge.left), len(merge.right)


def merges_by_score(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, those of the highest score first.

    For example "ab" (-1), "abc" (-2) and the letters give ("a", "b") and then ("ab", "c"); of
    ("a", "bc") there is nothing, because "bc" is no token.
    """
    scores = {
        piece.text: piece.score
        for piece in pieces
        if piece.kind in (NORMAL, USER_DEFINED, UNUSED)
    }
    found = []
    for text, score in scores.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in scores and right in scores:
                found.append(_Merge(left, right, score))
    # Of pairs that make one token, or score alike, those with a longer left part come first.
    found.sort(key=_rank, reverse=True)
    return [(merge.left, merge.right) for merge in found]


def _normalizer(package: Any, model: Pieces) -> Any:
    """What is done to a text first: characters and spaces are replaced, a space is put before."""
    found, regex = package.normalizers, package.Regex
    steps = []
    if model.characters:
        steps.append(found.Precompiled(model.characters))
    if model.one_space:
        # A sign for a space at the end goes too, though none at the start.
        ends = regex(rf"\A +|[ {SPACE}]+\z")
        steps.append(found.Replace(ends, ""))
        steps.append(found.Replace(regex(" {2,}"), " "))
    if model.prefix and not model.prefix_once:
        steps.append(found.Prepend(SPACE))
    if not model.prefix_once:
        steps.append(found.Replace(" ", SPACE))
    return found.Sequence(steps)


def _decoder(package: Any, model: Pieces) -> Any:
    found = package.decoders
    steps = [found.Replace(SPACE, " "), found.ByteFallback(), found.Fuse()]
    if model.prefix:
        steps.append(found.Strip(content=" ", left=1, right=0))
    return found.Sequence(steps)


def add_by_kind(
    backend: Any, tokens: Sequence[str], kinds: Iterable[int]
) -> None:
    """Tells a tokenizer which of its tokens are never split or merged.

    Only control tokens, and the unknown one, are left out of decoded text.
    """
    special, plain = [], []
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (CONTROL, UNKNOWN):
            special.append(token)
        # Spaces are written as signs before a text is cut, and found by their merges.
        elif kind == USER_DEFINED and token.strip(SPACE):
            plain.append(token)
    add_tokens(backend, special, special=True)
    add_tokens(backend, plain, special=False)


def add_tokens(backend: Any, tokens: Iterable[str], special: bool) -> None:
    """Tells a tokenizer of tokens that are taken whole, before a text is normalized."""
    package = tokenizers_package()
    backend.add_tokens(
        [
            package.AddedToken(token, special=special, normalized=False)
            for token in tokens
        ]
    )


def begin_and_end(
    backend: Any, begin: Sequence[str], end: Sequence[str]
) -> None:
    """Makes a tokenizer put tokens before and after every text: as many as there are, or none."""
    package = tokenizers_package()
    backend.post_processor = package.processors.TemplateProcessing(
        single=[*map(_of_text, begin), "$A:0", *map(_of_text, end)],
        special_tokens=[
            (token, backend.token_to_id(token)) for token in {*begin, *end}
        ],
    )


def _of_text(token: str) -> str:
    """A token in a template of `tokenizers`, where 0 stands for the first text of a pair."""
    return f"{token}:0"


def asked(
    backend: Any, is_asked: bool, token_id: int | None, problem: str
) -> list[str]:
    """The token that is to be put around every text; an empty list if none is.

    Raises:
        ValueError: one is asked for, and there is none.
    """
    if not is_asked:
        return []
    if token_id is None:
        raise ValueError(problem)
    return [backend.id_to_token(token_id)]
