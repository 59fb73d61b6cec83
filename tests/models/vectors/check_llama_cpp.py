"""Whether llama.cpp reads what `save_gguf` writes, and computes what sqjax computes. Run by hand, in two environments:

    python tests/models/vectors/check_llama_cpp.py write FOLDER       # with sqjax, its demo extra, and SmolLM2 in the cache
    python tests/models/vectors/check_llama_cpp.py compare FOLDER     # with `pip install cyllama==0.2.18 numpy`

The first writes SmolLM2-135M, smoothed, in several types, and our logits of what `load` reads of each file; the second
runs llama.cpp on the files (cyllama brings it compiled) and compares tokens, the likeliest next token at every position,
and logits.
"""

import json
import sys
from pathlib import Path

import numpy as np

TYPES = ("f32", "q8_0", "q4_1", "q4_0")
TEXT = (
    "The capital of France is Paris. In 1969, three men flew to the Moon; it's 384,400 km away.\n\n"
    "    def add(a, b):\n        return a + b\n"
)


def write(folder):
    import jax
    import jax.numpy as jnp

    import sqjax as sq

    model, params = sq.models.load("smollm2-135m")
    ids = model.tokenizer.encode(TEXT)
    stats = sq.calibrate(model.apply, params, [jnp.asarray([ids])])
    smooth = sq.smooth(params, stats, alpha=0.5)
    apply = jax.jit(model.apply)
    found = {"ids": ids, "float": apply(params, jnp.asarray([ids]))[0]}
    for dtype in TYPES:
        file = folder / f"{dtype}.gguf"
        sq.models.save_gguf(file, model, smooth, dtype, overwrite=True)
        again, read = sq.models.load(file)
        assert again == model
        assert again.tokenizer.encode(TEXT) == ids
        found[dtype] = apply(read, jnp.asarray([ids]))[0]
        print(dtype, file.stat().st_size)
    np.savez(folder / "ours.npz", **{name: np.asarray(x) for name, x in found.items()})


def compare(folder):
    from cyllama.llama import llama_cpp as cpp

    class Model(cpp.LlamaModel):
        # Which this version of cyllama asks for, and does not have.
        n_vocab = property(lambda self: self.get_vocab().n_vocab)

    ours = np.load(folder / "ours.npz")
    ids = ours["ids"].tolist()
    rows = {}
    for dtype in TYPES:
        how = cpp.LlamaModelParams()
        how.n_gpu_layers = 0
        model = Model(str(folder / f"{dtype}.gguf"), how)
        tokens = model.get_vocab().tokenize(TEXT, False, True)
        batch_how = cpp.LlamaContextParams()
        batch_how.n_ctx = batch_how.n_batch = batch_how.n_ubatch = 256
        context = cpp.LlamaContext(model, batch_how)
        batch = cpp.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        batch.set_batch(ids, 0, True)
        context.decode(batch)
        theirs = np.stack([np.asarray(context.get_logits_ith(i)) for i in range(len(ids))])
        mine = ours[dtype]
        spread = mine.std()
        rows[dtype] = {
            "same tokens": tokens == ids,
            "same likeliest": float((theirs.argmax(1) == mine.argmax(1)).mean()),
            "rms difference / spread": float(np.sqrt(((theirs - mine) ** 2).mean()) / spread),
            "largest difference / spread": float(np.abs(theirs - mine).max() / spread),
            "our quantization's own, rms": float(
                np.sqrt(((ours["float"] - mine) ** 2).mean()) / spread
            ),
        }
    print(json.dumps({"tokens": len(ids), **rows}, indent=1))


if __name__ == "__main__":
    {"write": write, "compare": compare}[sys.argv[1]](Path(sys.argv[2]))
