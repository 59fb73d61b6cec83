"""Quantizes SmolLM2 with its peers' own code, and measures what became of it.

    python theirs.py FOLDER ROW ...        # each row by its name, or
    python theirs.py FOLDER --list

FOLDER holds what `ours.py write` wrote: the float model and the windows of both texts. Of each row
FOLDER/theirs/ROW.json says the seconds of a core that quantizing took and the mean negative
log-likelihood of every window of the evaluation text. Their functions are called as their examples
call them, on the same calibration windows in the same order, in float32, on one thread. `README.md`
has the environments.
"""

import argparse
import importlib.metadata
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

SEED = 0
#: Windows that are evaluated at once, because weights are rounded anew for each forward pass.
BATCH = 4


class Row(NamedTuple):
    """What quantizes the model of a folder, and the packages whose versions are kept."""

    quantized: Callable[[Path], Any]
    packages: tuple[str, ...]


# The model and the texts --------------------------------------------------------------------------


def load(folder: Path) -> Any:
    """The float model, as transformers reads it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder / "float", torch_dtype=torch.float32
    )
    return model.eval()


def calibration(folder: Path) -> np.ndarray:
    """The ids of the calibration windows, (windows, tokens)."""
    return np.load(folder / "calibration.npy")


@torch.no_grad()
def losses(model: Any, windows: np.ndarray) -> list[float]:
    """The mean negative log-likelihood of each window's tokens after its first."""
    found = []
    for start in range(0, len(windows), BATCH):
        ids = torch.tensor(windows[start : start + BATCH], dtype=torch.long)
        logits = model(ids, use_cache=False).logits
        for of_window, window in zip(logits, ids, strict=True):
            predicted = of_window[:-1].double()
            loss = torch.nn.functional.cross_entropy(predicted, window[1:])
            found.append(float(loss))
    return found


# llm-compressor -----------------------------------------------------------------------------------


def compressor(*recipe: Callable[[], Any]) -> Callable[[Path], Any]:
    """A model on which llm-compressor has run these modifiers, in its `oneshot`."""

    def quantized(folder: Path) -> Any:
        from datasets import Dataset
        from llmcompressor import oneshot

        ids = calibration(folder).tolist()
        rows = [
            {"input_ids": row, "attention_mask": [1] * len(row)} for row in ids
        ]
        model = load(folder)
        oneshot(
            model=model,
            dataset=Dataset.from_list(rows),
            recipe=[make() for make in recipe],
            num_calibration_samples=len(ids),
            shuffle_calibration_samples=False,
            max_seq_length=len(ids[0]),
        )
        return model

    return quantized


def smoothquant(strength: float) -> Callable[[], Any]:
    """Its SmoothQuant, on the groups that it takes by itself: those after the two norms."""

    def make() -> Any:
        from llmcompressor.modifiers.transform import SmoothQuantModifier

        return SmoothQuantModifier(smoothing_strength=strength)

    return make


def awq_scales() -> Any:
    """Its AWQ: scales only, no clips; 20 candidates for each group."""
    from llmcompressor.modifiers.transform import AWQModifier

    # It pins what it keeps, for faster copies to an accelerator; torch raises where there is none.
    torch.Tensor.pin_memory = lambda tensor, *_: tensor
    return AWQModifier()


def rounding(**scheme: Any) -> Callable[[], Any]:
    """Its `QuantizationModifier`: round to nearest."""

    def make() -> Any:
        from llmcompressor.modifiers.quantization import QuantizationModifier

        return QuantizationModifier(ignore=["lm_head"], **scheme)

    return make


def gptq(**scheme: Any) -> Callable[[], Any]:
    """Its GPTQ, with its own damping and order of activations."""

    def make() -> Any:
        from llmcompressor.modifiers.gptq import GPTQModifier

        return GPTQModifier(ignore=["lm_head"], **scheme)

    return make


def int4(group_size: int, symmetric: bool) -> Mapping[str, Any]:
    """Weights of 4 bits in groups along the inputs; activations stay float."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": group_size,
        "symmetric": symmetric,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"config_groups": groups}


# torchao ------------------------------------------------------------------------------------------


def torchao(alpha: float | None) -> Callable[[Path], Any]:
    """A model on which torchao has run its SmoothQuant: 1/s at run time, at every linear layer."""

    def quantized(folder: Path) -> Any:
        from torchao.prototype.smoothquant import SmoothQuantConfig
        from torchao.quantization import (
            Int8DynamicActivationInt8WeightConfig,
            quantize_,
        )

        model = load(folder)
        base = Int8DynamicActivationInt8WeightConfig()
        # Running maxima: its other observer keeps all activations, which is the same result.
        prepare, convert = (
            SmoothQuantConfig(base, step, alpha, use_running_absmax=True)
            for step in ("prepare", "convert")
        )
        quantize_(model, prepare, filter_fn=is_linear_but_head)
        with torch.no_grad():
            for window in calibration(folder):
                ids = torch.tensor(window[None], dtype=torch.long)
                model(ids, use_cache=False)
        quantize_(model, convert, filter_fn=is_linear_but_head)
        return model

    return quantized


def is_linear_but_head(module: Any, name: str) -> bool:
    """Whether torchao is to quantize this module."""
    return isinstance(module, torch.nn.Linear) and "lm_head" not in name


# AutoAWQ ------------------------------------------------------------------------------------------


def autoawq(group_size: int) -> Callable[[Path], Any]:
    """A model on which AutoAWQ has run its search of scales and of clips, with zero points.

    It packs weights for GPUs only. So it is asked to apply what it found and no more
    (`export_compatible`), and its own rounding is called afterwards, on float32.
    """

    def quantized(folder: Path) -> Any:
        from awq import AutoAWQForCausalLM
        from transformers import AutoTokenizer

        path = str(folder / "float")
        awq = AutoAWQForCausalLM.from_pretrained(
            path, torch_dtype=torch.float32, device_map="cpu"
        )
        ids = calibration(folder).tolist()
        awq.quantize(
            AutoTokenizer.from_pretrained(path),
            quant_config={
                "zero_point": True,
                "q_group_size": group_size,
                "w_bit": 4,
                "version": "GEMM",
            },
            calib_data=ids,
            max_calib_samples=len(ids),
            max_calib_seq_len=len(ids[0]),
            export_compatible=True,
        )
        for name, module in awq.model.named_modules():
            if is_linear_but_head(module, name):
                rounded, *_ = awq.quantizer.pseudo_quantize_tensor(
                    module.weight.data
                )
                module.weight.data = rounded
        return awq.model

    return quantized


# The rows -----------------------------------------------------------------------------------------

COMPRESSOR = ("llmcompressor", "compressed-tensors", "transformers")
G64 = int4(64, symmetric=False)
G64_SYMMETRIC = int4(64, symmetric=True)
#: 576 inputs are no whole number of groups of 128, which all peers refuse; so no g128.
ROWS = {
    "float": Row(load, ("transformers",)),
    "w8a8-compressor-rounding": Row(
        compressor(rounding(scheme="W8A8")), COMPRESSOR
    ),
    "w8a8-compressor-smooth": Row(
        compressor(smoothquant(0.8), rounding(scheme="W8A8")), COMPRESSOR
    ),
    "w8a8-compressor-smooth-gptq": Row(
        compressor(smoothquant(0.8), gptq(scheme="W8A8")), COMPRESSOR
    ),
    "w8a8-torchao": Row(torchao(0.5), ("torchao", "transformers")),
    "w4a16-compressor-rounding": Row(compressor(rounding(**G64)), COMPRESSOR),
    "w4a16-compressor-gptq": Row(compressor(gptq(**G64)), COMPRESSOR),
    "w4a16-compressor-gptq-symmetric": Row(
        compressor(gptq(**G64_SYMMETRIC)), COMPRESSOR
    ),
    "w4a16-compressor-awq": Row(
        compressor(awq_scales, rounding(**G64)), COMPRESSOR
    ),
    "w4a16-compressor-awq-gptq": Row(
        compressor(awq_scales, gptq(**G64)), COMPRESSOR
    ),
    "w4a16-autoawq": Row(autoawq(64), ("autoawq", "transformers")),
}


def measure(folder: Path, name: str, count: int | None) -> None:
    """Quantizes by one row, and writes what was measured."""
    torch.manual_seed(SEED)
    row = ROWS[name]
    start = time.process_time()
    model = row.quantized(folder)
    seconds = time.process_time() - start
    windows = np.load(folder / "evaluation.npy")[:count]
    result = {
        "name": name,
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("torch", *row.packages)
        },
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "losses": losses(model, windows),
    }
    path = folder / "theirs" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    perplexity = np.exp(np.mean(result["losses"]))
    print(f"{name}: perplexity {perplexity:.4f}, {seconds:.0f} s", flush=True)


def main() -> None:
    """Runs the rows that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("rows", nargs="*", metavar="ROW", choices=[*ROWS, []])
    parser.add_argument("--list", action="store_true", help="print the rows")
    parser.add_argument("--windows", type=int, help="how many are evaluated")
    options = parser.parse_args()
    if options.list:
        print("\n".join(ROWS))
    torch.set_num_threads(1)
    for name in options.rows:
        measure(options.folder, name, options.windows)


if __name__ == "__main__":
    main()
