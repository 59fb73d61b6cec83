"""How much each part measures: on a GPU, and in a tiny run that any machine ends soon."""

from typing import NamedTuple

from sqjax.models import DecoderConfig, llama_config


class Size(NamedTuple):
    """How much is measured.

    Attributes:
        shapes: (inputs, outputs) of weights, the most telling one first.
        rows: numbers of activation rows, likewise.
        square: the size of the square product that shows what the card can do.
        copied: elements of the copy that shows the same of its memory.
        rotated: bytes of weights that calls go through in turn, so that no cache holds them.
        config: the model's, but for its number of layers.
        layers: of the whole model; part "layer" has one.
        prompt: tokens of a prefill.
        context: tokens in the cache of a decode step.
        batches: rows that decode together.
        repeats: calls that are timed.
    """

    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    square: int
    copied: int
    rotated: int
    config: DecoderConfig
    layers: int
    prompt: int
    context: int
    batches: tuple[int, ...]
    repeats: int


def _config(*sizes: int) -> DecoderConfig:
    """A Llama of one layer: vocabulary, channels, the MLP's, heads, kv heads, a head's channels."""
    vocabulary, channels, inside, heads, kv_heads, head = sizes
    return llama_config(
        vocabulary, channels, inside, 1, heads, kv_heads, head, max_length=4096
    )


#: Llama-3-8B's four shapes: gate and up, down, q and o, k and v. Of eight of its 32 layers a head
#: of 32,000 tokens is as large a share as its own head is of all of them.
FULL = Size(
    shapes=((4096, 14336), (14336, 4096), (4096, 4096), (4096, 1024)),
    rows=(16, 4096, 1, 128, 512),
    square=8192,
    copied=2**29,
    rotated=2 * 10**8,
    config=_config(32000, 4096, 14336, 32, 8, 128),
    layers=8,
    prompt=2048,
    context=1024,
    batches=(1, 64, 16),
    repeats=10,
)
TINY = Size(
    shapes=((256, 128),),
    rows=(8,),
    square=128,
    copied=2**16,
    rotated=0,
    config=_config(256, 128, 256, 4, 2, 64),
    layers=1,
    prompt=32,
    context=16,
    batches=(2,),
    repeats=2,
)
