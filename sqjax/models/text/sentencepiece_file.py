"""Reads ``tokenizer.model``: a sentencepiece model, a message in the wire format of protobuf.

A message is a row of fields. Each is a key, which holds the field's number and how its value is
written, and the value: a whole number of as many bytes as it needs (a varint), 4 or 8 bytes, or a
length and that many bytes, which may be a message again.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sqjax.files.opening import open_file
from sqjax.models.text.building import BYTE, NORMAL, Piece, Pieces

_VARINT, _EIGHT_BYTES, _COUNTED, _FOUR_BYTES = 0, 1, 2, 5
_SIZES = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}

# Numbers of fields: of the model, of a piece, of how it was trained, and of how it normalizes.
_PIECES, _TRAINING, _NORMALIZING = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_MODEL_TYPE, _SUFFIX, _BYTES = 3, 24, 35
_UNKNOWN, _BEGIN, _END, _PADDING = 40, 41, 42, 43
#: {role: the number of the field with its id, and the id where there is no field}.
_ROLES = {
    "bos_token": (_BEGIN, 1),
    "eos_token": (_END, 2),
    "pad_token": (_PADDING, -1),
}
_CHARACTERS, _PREFIX, _ONE_SPACE, _ESCAPES = 2, 3, 4, 5

_UNIGRAM, _BPE = 1, 2

#: Units of a block of a trie, and the bit that marks a leaf.
_BLOCK, _LEAF = 256, np.uint32(1 << 31)


def read_sentencepiece(path: Path) -> tuple[Pieces, dict[str, str]]:
    """The pieces of a model, and {"bos_token": text, ...} of its special tokens.

    Raises:
        ValueError: it is no sentencepiece model, or one of a kind that can not be built here; names
            the file.
    """
    with open_file(path) as file:
        data = file.read()
    try:
        return _model(data)
    except _WrongError as error:
        raise ValueError(
            f"{path}: expected a sentencepiece model, got {error}; fetch it again, or save the "
            "tokenizer as tokenizer.json"
        ) from error


class _WrongError(Exception):
    """What is wrong with a model, in words that follow "got"."""


def _model(data: bytes) -> tuple[Pieces, dict[str, str]]:
    fields = list(_fields(data))
    pieces = [
        _piece(_of_bytes(value, "a piece"))
        for number, value in fields
        if number == _PIECES
    ]
    training = _message(fields, _TRAINING)
    normalizing = _message(fields, _NORMALIZING)
    kind = training.get(_MODEL_TYPE, _UNIGRAM)
    _check_kind(kind, training, normalizing)
    unknown = _id(training, _UNKNOWN, 0, pieces)
    if unknown is None:
        raise _WrongError("one without a token for what is unknown")
    _check_pieces(pieces)
    characters = _of_bytes(normalizing.get(_CHARACTERS, b""), "characters")
    _check_characters(characters)
    model = Pieces(
        pieces=pieces,
        merges=kind == _BPE,
        unknown=unknown,
        bytes_for_unknown=bool(training.get(_BYTES, False)),
        prefix=bool(normalizing.get(_PREFIX, True)),
        one_space=bool(normalizing.get(_ONE_SPACE, True)),
        characters=characters,
    )
    ids = {
        role: _id(training, number, default, pieces)
        for role, (number, default) in _ROLES.items()
    }
    special = {role: pieces[i].text for role, i in ids.items() if i is not None}
    return model, special


def _check_kind(
    kind: Any, training: Mapping[int, Any], normalizing: Mapping[int, Any]
) -> None:
    """Raises unless this is a kind of model that is built here."""
    other = kind not in (_UNIGRAM, _BPE)
    reasons = {
        f"one of type {kind}, which is neither Unigram nor BPE": other,
        "one that puts spaces after words": training.get(_SUFFIX, False),
        "one that keeps spaces as they are": not normalizing.get(
            _ESCAPES, True
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise _WrongError(reason)


def _check_pieces(pieces: Sequence[Piece]) -> None:
    """Raises unless all pieces differ; those of bytes must be all or none."""
    if len({piece.text for piece in pieces}) != len(pieces):
        raise _WrongError("one with a piece twice")
    count = sum(piece.kind == BYTE for piece in pieces)
    if count not in (0, 256):
        raise _WrongError(f"one with pieces of {count} bytes, not of 256")


def _check_characters(table: bytes) -> None:
    """Raises unless a table of replaced characters stays inside itself, wherever a text leads.

    It is the size of a trie, the trie (blocks of 256 units of 4 bytes), and the texts that replace
    others, each with a zero byte after it. A unit is a leaf, which says where its text begins, or
    says how far on the units of its 256 possible children are.
    """
    if not table:
        return
    size = int.from_bytes(table[:4], "little")
    texts = len(table) - 4 - size
    if size % (4 * _BLOCK) or texts < 1 or table[-1] != 0:
        raise _WrongError("a table of characters that is cut off")
    units = np.frombuffer(table, "<u4", count=size // 4, offset=4)
    steps = (units >> 10) << ((units & 0x200) >> 6)
    children = np.arange(len(units), dtype=np.uint32) ^ steps
    is_node = units < _LEAF
    # The first child of a unit with this bit is the leaf for what has been read so far.
    has_leaf = is_node & (units & 0x100 > 0)
    if np.any(is_node & (children >= len(units))) or np.any(
        units[children[has_leaf]] % _LEAF >= texts
    ):
        raise _WrongError("a table of characters that leads out of itself")


def _id(
    training: Mapping[int, Any],
    number: int,
    default: int,
    pieces: Sequence[Piece],
) -> int | None:
    """The id that a field holds; -1 says that there is none."""
    found = training.get(number, default)
    # A negative number is written as if it had 64 bits without a sign.
    if found == -1 or found >= 2**63:
        return None
    if found >= len(pieces):
        raise _WrongError(f"an id {found} of {len(pieces)} pieces")
    return found


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    text = _of_bytes(fields.get(_TEXT, b""), "a piece's text")
    score = _of_bytes(fields.get(_SCORE, bytes(4)), "a score")
    if len(score) != 4:
        raise _WrongError(f"a score of {len(score)} bytes")
    try:
        spelled = text.decode()
    except UnicodeDecodeError as error:
        raise _WrongError(f"a piece that is no UTF-8: {error}") from error
    (number,) = struct.unpack("<f", score)
    return Piece(spelled, number, fields.get(_KIND, NORMAL))


def _message(fields: Sequence[tuple[int, Any]], number: int) -> dict[int, Any]:
    """The fields of a message inside; what it says of a field last counts."""
    inside: dict[int, Any] = {}
    for found, value in fields:
        if found == number:
            inside |= dict(_fields(_of_bytes(value, f"field {number}")))
    return inside


def _of_bytes(value: Any, what: str) -> bytes:
    if not isinstance(value, bytes):
        raise _WrongError(f"a number for {what}")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field: an int for a varint, bytes for all others."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, form = key >> 3, key & 7
        if form == _VARINT:
            value: Any
            value, at = _varint(data, at)
        else:
            size, at = _size(data, at, form)
            value = data[at : at + size]
            if len(value) < size:
                raise _WrongError(
                    f"a field of {size} bytes where {len(value)} are left"
                )
            at += size
        yield number, value


def _size(data: bytes, at: int, form: int) -> tuple[int, int]:
    """The bytes of a value, and where it begins."""
    if form == _COUNTED:
        return _varint(data, at)
    if form not in _SIZES:
        raise _WrongError(f"a field of form {form}")
    return _SIZES[form], at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A whole number in groups of 7 bits, the lowest first, and where it ends.

    For example the bytes 0xAC 0x02 are 0b10_0101100 = 300: a set high bit says that more follows.
    """
    number = 0
    for position in range(10):
        if at + position >= len(data):
            raise _WrongError("a file that ends inside a number")
        byte = data[at + position]
        number |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            return number, at + position + 1
    raise _WrongError("a number of more than 10 bytes")
