"""Tiny random image encoders, and what torch computes with them: as `tiny_checkpoint`.

``tests/models/vectors/vision/NAME.json`` holds a case: config.json as two versions of transformers
write it, and the names and shapes of the tensors. Weights are not stored: `draw` makes a tensor's
from its name. ``NAME.npz`` holds what transformers computed with them on torch.
"""

import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

VECTORS = Path(__file__).parents[1] / "models" / "vectors" / "vision"

#: (kind, what the names of its tensors hold), of which the first that is there is the kind.
KINDS = (
    ("bias", ("bias",)),
    ("gain", ("norm", "lambda1", "logit_scale")),
    (
        "embedding",
        ("position_embedding", "token_embedding", "cls_", "class_", "probe", "mask_token"),
    ),
    ("matrix", ("",)),
)
#: (the middle, the spread) of each kind; that of a matrix is divided by the square root of its inputs.
DRAWN = {"bias": (0.0, 0.1), "gain": (1.0, 0.2), "embedding": (0.0, 0.4), "matrix": (0.0, 1.5)}


def draw(name, shape):
    """A tensor's random float32 weights, the same on every machine."""
    kind = next(kind for kind, parts in KINDS if any(part in name for part in parts))
    middle, spread = DRAWN[kind]
    if kind == "matrix":
        # of a convolution (out, channels, rows, columns) the inputs are the last three axes
        spread /= np.prod(shape[1:]) ** 0.5
    rng = np.random.default_rng([0, zlib.crc32(name.encode())])
    # between -sqrt(3) and sqrt(3), where the standard deviation is 1
    noise = (2 * rng.random(shape) - 1) * 3**0.5
    # a scalar stays an array
    return np.asarray(middle + spread * noise, np.float32)


def cases():
    """The names of all cases."""
    return sorted(path.stem for path in VECTORS.glob("*.json"))


def load(name):
    """A case: what its JSON file says, and under "vectors" the arrays of its npz file."""
    case = json.loads((VECTORS / f"{name}.json").read_text())
    with np.load(VECTORS / f"{name}.npz") as arrays:
        case["vectors"] = dict(arrays)
    return case


def weights(case, version="4"):
    """All tensors of a checkpoint, by the names that this version of transformers writes.

    A tensor is drawn by the name of 4.57, so that both versions' checkpoints are one model.
    """
    dropped = case["dropped"] if version == "5" else ""
    tensors = {}
    for name, shape in case["shapes"].items():
        tensors[name.removeprefix(dropped)] = draw(name, tuple(shape))
    return tensors


def write(case, directory, version="4"):
    """Writes a case's checkpoint as that major version of transformers does."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(case["configs"][version]))
    save_file(weights(case, version), directory / "model.safetensors", {"format": "pt"})
    return directory
