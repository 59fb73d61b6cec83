"""The reference vectors in tests/models/vectors/tokenizers, which `make.py` there wrote."""

import base64
import json
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "models" / "vectors" / "tokenizers"
DIRECTORIES = ("gpt2", "llama3", "qwen2", "llama2", "gemma", "t5", "bert")
SENTENCEPIECES = ("spm_bpe", "spm_unigram")


def vectors(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def write_json(directory, **files):
    """Files by their names without ".json"; None for none."""
    for name, content in files.items():
        if content is not None:
            (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def write_directory(directory, name):
    """The directory that transformers read for these vectors."""
    files = vectors(name)["files"]
    return write_json(directory, **{key.removesuffix(".json"): c for key, c in files.items()})


def write_model(directory, name):
    """A directory with tokenizer.model alone."""
    (directory / "tokenizer.model").write_bytes(base64.b64decode(vectors(name)["model"]))
    return directory


def merges_of(name):
    """The vocabulary, {token: id}, and the merges, "a b" each, of a byte-level tokenizer.json."""
    model = vectors(name)["files"]["tokenizer.json"]["model"]
    return model["vocab"], [" ".join(merge) for merge in model["merges"]]
