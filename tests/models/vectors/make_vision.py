"""Makes `vision/`: for each case a tiny checkpoint of images, and what torch computes with it.

Run by hand, once in an environment with transformers 4.57 and then in one with transformers 5, both
with torch, safetensors and numpy:

    python tests/models/vectors/make_vision.py [NAME ...]

The first writes NAME.json and NAME.npz; the second adds config.json and the tensors' names as
transformers 5 writes them, and says where it computes something else. Without names all cases are
made.

NAME.json:
    architecture: the class of transformers.
    configs: {"4": config.json, "5": config.json} of the two versions.
    shapes: {name of a tensor on disk: its shape}, as 4.57 writes them.
    dropped: what version 5 leaves out in front of these names.
    versions: of transformers and torch.
    deviations: how far version 5 differs from what is stored; empty where it does not.

NAME.npz, float32:
    pixels (2, rows, columns, channels): torch reads them with the channels in front.
    hidden: the last hidden state; pooled: what is made of it; embeds: its projection; logits: of a
        head of classes. Those that the class has.
    ids (3, 7), text_embeds, similarity: of a class with two towers, the texts, their vectors, and
        the logits of each image and each text.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))
import tiny_checkpoint
import tiny_vision as tiny

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
VERSION = transformers.__version__.split(".")[0]

DINO = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
}
IMAGE = {**DINO, "intermediate_size": 48}
#: A last row and a last column that fill no patch.
ODD = {**IMAGE, "image_size": 14}
TEXT = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 9,
    "bos_token_id": 38,
    "eos_token_id": 39,
    "pad_token_id": 1,
}
#: The end of a text as it is written in the configurations of the first CLIPs.
OLD_TEXT = {**TEXT, "bos_token_id": 0, "eos_token_id": 2}

#: Name -> (class of the model, keys of the configuration).
CASES = {
    "vit": ("ViTModel", IMAGE),
    "vit_classes": (
        "ViTForImageClassification",
        {**IMAGE, "num_labels": 5, "qkv_bias": False, "num_channels": 1, "hidden_act": "gelu_new"},
    ),
    "clip_vision": ("CLIPVisionModel", ODD),
    "clip_vision_projected": ("CLIPVisionModelWithProjection", {**IMAGE, "projection_dim": 20}),
    "clip": (
        "CLIPModel",
        {"vision_config": IMAGE, "text_config": TEXT, "projection_dim": 20},
    ),
    "clip_old": (
        "CLIPModel",
        {"vision_config": IMAGE, "text_config": OLD_TEXT, "projection_dim": 20},
    ),
    "siglip_vision": ("SiglipVisionModel", ODD),
    "siglip": (
        "SiglipModel",
        {"vision_config": IMAGE, "text_config": {**TEXT, "projection_size": 32}},
    ),
    "dinov2": ("Dinov2Model", {**DINO, "mlp_ratio": 2}),
    "dinov2_classes": (
        "Dinov2ForImageClassification",
        {**DINO, "mlp_ratio": 2, "use_swiglu_ffn": True, "num_labels": 5},
    ),
}


def learn(architecture, config):
    """config.json, and the names and shapes on disk, as `save_pretrained` writes them."""
    model = getattr(transformers, architecture)(config)
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        written = json.loads((Path(place) / "config.json").read_text())
        tensors = load_file(Path(place) / "model.safetensors")
        return written, {name: list(array.shape) for name, array in sorted(tensors.items())}


def open_model(directory, architecture):
    """The model of a directory, every tensor of which must be in use, and every one be there."""
    model, info = getattr(transformers, architecture).from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info.get(key), (key, info[key])
    return model.eval()


def texts(config):
    """Three texts of 7 tokens, each with its end, of which two are filled behind it."""
    rng = np.random.default_rng(7)
    ids = rng.integers(3, 37, (3, 7))
    # Version 5 leaves out what is the class's own, so both are looked up in the object.
    end = 39 if config.eos_token_id == 2 else config.eos_token_id
    for row, length in enumerate((7, 5, 3)):
        ids[row, length - 1] = end
        ids[row, length:] = 1
    return ids


def compute(directory, architecture):
    """What the model computes."""
    model = open_model(directory, architecture)
    config = getattr(model.config, "vision_config", model.config)
    rng = np.random.default_rng(5)
    sides = (config.image_size, config.image_size, config.num_channels)
    pixels = rng.normal(size=(2, *sides)).astype(np.float32)
    inputs = {"pixel_values": torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())}
    found = {"pixels": pixels}
    with torch.no_grad():
        if hasattr(model, "text_model"):
            ids = texts(model.config.text_config)
            out = model(**inputs, input_ids=torch.from_numpy(ids))
            found["ids"] = ids.astype(np.int32)
            found["hidden"] = out.vision_model_output.last_hidden_state
            found["similarity"] = out.logits_per_image
            found["embeds"] = vectors(model.get_image_features(**inputs))
            found["text_embeds"] = vectors(model.get_text_features(torch.from_numpy(ids)))
        else:
            out = model(**inputs, output_hidden_states=True)
            names = {
                "hidden": "last_hidden_state",
                "pooled": "pooler_output",
                "embeds": "image_embeds",
                "logits": "logits",
            }
            for ours, theirs in names.items():
                if out.get(theirs) is not None:
                    found[ours] = out[theirs]
    return {name: np.asarray(array) for name, array in found.items()}


def vectors(output):
    """The vectors alone: version 5 gives them with the hidden states."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def computed(case):
    """What this version of transformers computes with its own checkpoint of a case."""
    with tempfile.TemporaryDirectory() as place:
        directory = tiny.write(case, Path(place), VERSION)
        return compute(directory, case["architecture"])


def make(architecture, keys):
    """A case by this version of transformers alone: its JSON and its arrays."""
    config_class = getattr(transformers, architecture).config_class
    written, shapes = learn(architecture, config_class(**keys))
    case = {
        "architecture": architecture,
        "configs": {VERSION: written},
        "shapes": shapes,
        "dropped": "",
        "versions": {VERSION: transformers.__version__, "torch": torch.__version__},
        "deviations": {},
    }
    return case, computed(case)


def compare(case, keys, stored):
    """The case with this version's config.json, names and deviations."""
    config_class = getattr(transformers, case["architecture"]).config_class
    case["configs"][VERSION], shapes = learn(case["architecture"], config_class(**keys))
    case["versions"][VERSION] = transformers.__version__
    if shapes != case["shapes"]:
        case["dropped"] = "vision_model."
    bare = {name.removeprefix(case["dropped"]): shape for name, shape in case["shapes"].items()}
    assert shapes == bare, (shapes, bare)
    case["deviations"] = {}
    for name, array in computed(case).items():
        difference = float(np.abs(array - stored[name]).max())
        if difference > 2e-5:
            case["deviations"][name] = difference
    return case


def main():
    """Makes the cases that the command line names, or all."""
    tiny.VECTORS.mkdir(exist_ok=True)
    for name in sys.argv[1:] or CASES:
        architecture, keys = CASES[name]
        path = tiny.VECTORS / f"{name}.json"
        if VERSION == "5":
            stored = tiny.load(name)
            case = compare(stored, keys, stored.pop("vectors"))
        else:
            case, arrays = make(architecture, keys)
            np.savez_compressed(path.with_suffix(".npz"), **arrays)
            print({key: array.shape for key, array in arrays.items()})
        path.write_text(tiny_checkpoint.as_text(case))
        print(name, case["dropped"], case["deviations"], flush=True)


if __name__ == "__main__":
    main()
