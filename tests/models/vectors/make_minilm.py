"""Makes `minilm.npz`: embeddings of some sentences by all-MiniLM-L6-v2 on torch.

Run by hand with the directory of the checkpoint, where torch and transformers are:

    python tests/models/vectors/make_minilm.py DIRECTORY

The formulas are those of sentence-transformers, as modules.json asks for: the mean over the tokens,
divided by its length. `minilm.npz` holds `sentences` (8), and `embeddings` (8, 384), float32.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, BertModel

SENTENCES = [
    "The cat sits on the mat.",
    "A feline is resting on a rug.",
    "Interest rates rose again this spring.",
    "How do I bake bread without yeast?",
    "def add(a, b): return a + b",
    "Der Hund läuft über die Straße.",
    "x",
    "A long text, longer than the model reads. " * 40,
]


def main(directory):
    """Writes the file."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = BertModel.from_pretrained(directory, attn_implementation="eager").eval()
    inputs = tokenizer(
        [sentence.strip() for sentence in SENTENCES],
        padding=True,
        truncation=True,
        max_length=256,
        return_tensors="pt",
    )
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1).float()
    mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    embeddings = torch.nn.functional.normalize(mean, p=2, dim=1).numpy()
    path = Path(__file__).with_name("minilm.npz")
    np.savez_compressed(path, sentences=np.array(SENTENCES), embeddings=embeddings)


if __name__ == "__main__":
    main(sys.argv[1])
