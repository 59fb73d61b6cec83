"""Tiny random checkpoints of many families, and what torch computes with them.

``tests/models/vectors/decoders/NAME.json`` holds a case: config.json as two versions of
transformers write it, and the names and shapes of the tensors. Weights are not stored: `draw` makes
a tensor's from its name. ``NAME.npz`` holds what transformers computed with them on torch.
``encoders`` beside that folder holds the encoders' in the same way.
"""

import json
import re
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

FOLDERS = Path(__file__).parents[1] / "models" / "vectors"
VECTORS = FOLDERS / "decoders"

#: Which kind of tensor a name is, the first that matches.
KINDS = (
    ("bias", r"bias$"),
    ("gain", r"([nN]orm|ln_\w+)(\.norms\.\d+)?\.weight$"),
    ("embedding", r"(embed_tokens|embed_positions|wte|wpe|embed_in)\.weight$"),
    ("embedding", r"(word|tok|position|token_type)_embeddings\.weight$"),
    ("head", r"(lm_head|embed_out)\.weight$"),
    ("router", r"(gate|router)\.weight$"),
    ("matrix", r""),
)
#: The spread of each kind; that of a matrix is divided by the square root of its inputs.
SPREAD = {"bias": 0.1, "gain": 0.2, "embedding": 0.4, "head": 3.0, "router": 2.0, "matrix": 1.3}


def draw(name, shape, seed=0, one_plus=False, spread=None):
    """A tensor's random float32 weights, the same on every machine.

    Numbers are uniform about 0; about 1 for the gain of a norm, but where a model adds that 1 itself
    (`one_plus`). `spread` is {kind: spread} for kinds that shall not have that of `SPREAD`.
    """
    kind = next(kind for kind, pattern in KINDS if re.search(pattern, name))
    size = {**SPREAD, **(spread or {})}[kind]
    if kind in ("head", "router", "matrix"):
        size /= shape[-1] ** 0.5
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    # between -sqrt(3) and sqrt(3), where the standard deviation is 1
    noise = (2 * rng.random(shape) - 1) * 3**0.5
    middle = 1.0 if kind == "gain" and not one_plus else 0.0
    return (middle + size * noise).astype(np.float32)


def cases(folder="decoders"):
    """The names of all cases."""
    return sorted(path.stem for path in (FOLDERS / folder).glob("*.json"))


def as_text(case):
    """A case as JSON, each configuration and each tensor on a line of its own."""
    lines = []
    for key, value in case.items():
        if key in ("configs", "shapes"):
            inner = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]
            lines.append(f"{json.dumps(key)}: {{\n" + ",\n".join(inner) + "\n}")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def load(name, folder="decoders"):
    """A case: what its JSON file says, and under "vectors" the arrays of its npz file."""
    path = FOLDERS / folder / f"{name}.json"
    case = json.loads(path.read_text())
    with np.load(path.with_suffix(".npz")) as arrays:
        case["vectors"] = dict(arrays)
    return case


def weights(case):
    """All tensors of a case's checkpoint, by name."""
    how = case["seed"], case["one_plus"], case["spread"]
    return {name: draw(name, tuple(shape), *how) for name, shape in case["shapes"].items()}


def write(case, directory, version="4"):
    """Writes a case's checkpoint, with config.json as that major version of transformers does."""
    directory.mkdir(exist_ok=True)
    config = case["configs"][version]
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights(case), directory / "model.safetensors", {"format": "pt"})
    return directory
