"""Text to token ids and back, with the `tokenizers` package, from what a checkpoint holds."""

from sqjax.models.text.directory import from_directory as from_directory
from sqjax.models.text.gguf import from_gguf_metadata as from_gguf_metadata
from sqjax.models.text.tokenizer import Tokenizer as Tokenizer
from sqjax.models.text.tokenizer import check_text as check_text
