"""Whether transformers, with compressed-tensors, computes what sqjax computes. Run by hand, in two environments:

    python tests/models/vectors/check_compressed_tensors.py write FOLDER    # with sqjax, and its demo extra
    python tests/models/vectors/check_compressed_tensors.py compare FOLDER  # with torch==2.13.0 transformers==4.57.6
                                                                            # compressed-tensors==0.20.1 accelerate

The first writes SmolLM2-135M as it is, smoothed in several schemes, and in one without smoothing, with our logits of
eight windows of the shipped text; the second reads each, and compares logits and perplexity.
"""

import json
import sys
from pathlib import Path

import numpy as np

TOKENS, WINDOWS, ALPHA = 512, 8, 0.85
FLOAT = "float"
NAMES = (FLOAT, "W8A16", "W8A8", "W8A8_O3", "FP8", "W8A8 not smoothed")


def perplexity(logits, ids):
    """Of windows of logits, (tokens, vocab) each, in float64."""
    losses = []
    for window, tokens in zip(logits, ids, strict=True):
        x = window[:-1].astype(np.float64)
        shifted = x - x.max(-1, keepdims=True)
        found = shifted[np.arange(len(x)), tokens[1:]]
        losses.append(np.mean(np.log(np.exp(shifted).sum(-1)) - found))
    return float(np.exp(np.mean(losses)))


def write(folder):
    import jax

    import sqjax as sq
    from sqjax.commands.shared import text_windows

    model, params = sq.models.load("smollm2-135m")
    calibration = text_windows(model, "calibration", TOKENS, WINDOWS)
    ids = text_windows(model, "evaluation", TOKENS, WINDOWS)
    np.save(folder / "ids.npy", ids)
    stats = sq.calibrate(model.apply, params, list(calibration[:, None]))
    s = sq.scales(params, stats, ALPHA)
    smooth = sq.fold(params, stats.graph, s)
    smooth_stats = sq.fold_stats(stats, s)
    apply = jax.jit(sq.quantized(model.apply))
    rows = {}
    for name in NAMES:
        target = folder / name
        if name == FLOAT:
            tree = smooth
            sq.models.save_huggingface(target, model, tree, overwrite=True)
        else:
            # A tied head is the embedding, for which the format has no name.
            rules = {"embed_tokens": None, ".*": getattr(sq, name.split()[0])}
            smoothed = "not smoothed" not in name
            tree = sq.quantize(
                smooth if smoothed else params, smooth_stats if smoothed else stats, rules
            )
            sq.models.save_compressed_tensors(target, model, tree, overwrite=True)
        logits = [np.asarray(apply(tree, window[None]))[0] for window in ids]
        np.save(folder / f"{name}.npy", logits[0])
        rows[name] = perplexity(logits, ids)
        print(name, rows[name], flush=True)
    (folder / "ours.json").write_text(json.dumps(rows))


def compare(folder):
    import torch
    from transformers import AutoModelForCausalLM

    ids = np.load(folder / "ids.npy")
    ours = json.loads((folder / "ours.json").read_text())
    for name in NAMES:
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = [model(torch.tensor(window[None])).logits[0].numpy() for window in ids]
        mine = np.load(folder / f"{name}.npy")
        row = {
            "largest difference / largest logit": float(
                np.abs(logits[0] - mine).max() / np.abs(mine).max()
            ),
            "our perplexity": ours[name],
            "their perplexity": perplexity(logits, ids),
        }
        print(name, json.dumps(row), flush=True)


if __name__ == "__main__":
    {"write": write, "compare": compare}[sys.argv[1]](Path(sys.argv[2]))
