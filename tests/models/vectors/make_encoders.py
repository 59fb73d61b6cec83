"""Makes `encoders/`: for each case a tiny checkpoint of a family, and what torch computes with it.

Run by hand, once in an environment with transformers 4.57 and then in one with transformers 5, both
with torch, safetensors and numpy:

    python tests/models/vectors/make_encoders.py [NAME ...]

The first writes NAME.json and NAME.npz; the second adds config.json as transformers 5 writes it,
and says where it computes something else. Without names all cases are made. A case of `ONLY_5` is
made by transformers 5 alone.

NAME.json is as of `make_decoders`.

NAME.npz:
    ids (2, 12); states (2, 12, channels), float32, without a mask.
    mask (2, 12): the second row is 7 tokens of text and 5 of padding; padded_ids (2, 12).
    padded_states (19, channels): of the 12 tokens of the first row, then of the 7 of the second.
    left_ids, left_mask, left_states: the same with the padding in front.
    types (2, 12), typed_states: with types of tokens, where the model has more than one.
    cls, max, mean, mean_sqrt_len (2, channels): the padded rows pooled, by the formulas of
        sentence-transformers.
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
import tiny_checkpoint as tiny

transformers.utils.logging.disable_progress_bar()
VERSION = transformers.__version__.split(".")[0]
FOLDER = tiny.FOLDERS / "encoders"

BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
MODERN = {
    **BASE,
    "num_hidden_layers": 4,
    "local_attention": 6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
#: Name -> (model_type, keys of the configuration).
CASES = {
    "bert": ("bert", BASE),
    "bert_tanh": ("bert", {**BASE, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5}),
    "roberta": ("roberta", {**BASE, "type_vocab_size": 1}),
    "xlm_roberta": ("xlm-roberta", {**BASE, "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "camembert": ("camembert", {**BASE, "type_vocab_size": 2}),
    "distilbert": (
        "distilbert",
        {
            "vocab_size": 64,
            "dim": 32,
            "hidden_dim": 48,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 40,
        },
    ),
    "mpnet": ("mpnet", {**BASE, "relative_attention_num_buckets": 32}),
    "nomic_bert": ("nomic_bert", BASE),
    "modernbert": ("modernbert", MODERN),
    "modernbert_biases": (
        "modernbert",
        {
            **MODERN,
            "attention_bias": True,
            "mlp_bias": True,
            "norm_bias": True,
            "global_attn_every_n_layers": 2,
            "local_attention": 5,
            "global_rope_theta": 5000.0,
            "local_rope_theta": 70.0,
        },
    ),
}

#: transformers 4.57 does not know this one.
ONLY_5 = ("nomic_bert",)


def learn(config):
    """config.json, and the names and shapes on disk, as `save_pretrained` writes them."""
    model = transformers.AutoModel.from_config(config)
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        written = json.loads((Path(place) / "config.json").read_text())
        tensors = load_file(Path(place) / "model.safetensors")
    return written, {name: list(array.shape) for name, array in sorted(tensors.items())}


def open_model(directory):
    """The model of a directory, every tensor of which must be in use, and every one be there."""
    model, info = transformers.AutoModel.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info.get(key), (key, info[key])
    return model.eval()


def pooled(states, mask):
    """The vectors of rows, as sentence-transformers makes them."""
    counted = mask.unsqueeze(-1).expand(states.size()).float()
    total, count = (states * counted).sum(1), counted.sum(1).clamp(min=1e-9)
    largest = torch.where(counted == 0, torch.tensor(-1e9), states).max(1).values
    return {
        "cls": states[:, 0],
        "max": largest,
        "mean": total / count,
        "mean_sqrt_len": total / count.sqrt(),
    }


def compute(directory, seed):
    """The arrays of a case."""
    rng = np.random.default_rng(2000 + seed)
    ids = torch.from_numpy(rng.integers(3, 64, (2, 12)))
    types = torch.from_numpy(rng.integers(0, 2, (2, 12)))
    model = open_model(directory)
    padding = model.config.pad_token_id
    padded, mask = ids.flip(0).clone(), torch.ones_like(ids)
    padded[1, 7:], mask[1, 7:] = padding, 0
    left, left_mask = padded.clone(), mask.flip(1)
    left[1] = padded[1].roll(5)

    def states(ids, mask, **more):
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask, **more).last_hidden_state

    of_padded = states(padded, mask)
    arrays = {
        "states": states(ids, torch.ones_like(ids)),
        "padded_states": of_padded[mask == 1],
        "left_states": states(left, left_mask)[left_mask == 1],
        **pooled(of_padded, mask),
    }
    integers = {"ids": ids, "mask": mask, "padded_ids": padded}
    integers |= {"left_ids": left, "left_mask": left_mask}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        whole = torch.ones_like(ids)
        arrays["typed_states"] = states(ids, whole, token_type_ids=types)
        integers["types"] = types
    return {
        **{name: array.numpy().astype(np.int32) for name, array in integers.items()},
        **{name: array.numpy().astype(np.float32) for name, array in arrays.items()},
    }


def in_directory(case, version, action):
    """What an action returns of a case's checkpoint."""
    with tempfile.TemporaryDirectory() as place:
        return action(tiny.write(case, Path(place), version))


def make(model_type, keys):
    """A case by this version of transformers alone: its JSON and its arrays."""
    config = transformers.AutoConfig.for_model(model_type, **keys)
    written, shapes = learn(config)
    case = {
        "model_type": model_type,
        "seed": 0,
        "one_plus": False,
        "spread": {},
        "configs": {VERSION: written},
        "shapes": shapes,
        "versions": {VERSION: transformers.__version__, "torch": torch.__version__},
        "deviations": {},
    }
    return case, in_directory(case, VERSION, lambda at: compute(at, 0))


def compare(case, stored):
    """The case with this version's config.json, and how far this version's arrays deviate."""
    config = in_directory(case, "4", transformers.AutoConfig.from_pretrained)
    case["configs"][VERSION], shapes = learn(config)
    case["versions"][VERSION] = transformers.__version__
    differences = {}
    if shapes != case["shapes"]:
        differences["shapes"] = shapes
    for version in case["configs"]:
        arrays = in_directory(case, version, lambda at: compute(at, 0))
        for key, array in arrays.items():
            difference = float(np.abs(array - stored[key]).max())
            if difference > 2e-5:
                differences[f"{key}, with the config.json of {version}"] = difference
    case["deviations"] = differences
    return case


def main():
    """Makes the cases that the command line names, or all."""
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or CASES:
        path = FOLDER / f"{name}.json"
        if VERSION != "5" and name in ONLY_5:
            continue
        if VERSION == "5" and name not in ONLY_5:
            stored = tiny.load(name, "encoders")
            case = compare(stored, stored.pop("vectors"))
        else:
            case, arrays = make(*CASES[name])
            np.savez_compressed(path.with_suffix(".npz"), **arrays)
        path.write_text(tiny.as_text(case))
        print(name, case["deviations"], flush=True)


if __name__ == "__main__":
    main()
