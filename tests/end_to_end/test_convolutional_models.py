"""A ResNet and a ConvNeXt, linen and NNX: they shrink 3.9 times and tell images as they did."""

import importlib.util
import json
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "convolutions.py"


def check(rows):
    """Smoothed int8 loses at most two images in a hundred, and takes a 3.9th of the memory."""
    whole = {}
    for row in rows:
        before = whole.setdefault((row["model"], row["framework"]), row)
        if "smoothed" in row["scheme"]:
            assert before["weight_bytes"] > 3.89 * row["weight_bytes"], row
            assert row["accuracy"] > before["accuracy"] - 0.02, row
    assert len(whole) == 4


def test_the_recorded_models_keep_their_accuracy():
    record = json.loads((ROOT / "benchmarks" / "records" / "convolutions.json").read_text())
    rows = [row for row in record["rows"] if "accuracy" in row]
    check(rows)
    assert min(row["accuracy"] for row in rows if row["scheme"] == "float32") > 0.6


@pytest.mark.slow
@pytest.mark.every_case
def test_a_shorter_training_shows_the_same():
    spec = importlib.util.spec_from_file_location("convolutions", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        spec.loader.exec_module(module)
        check(module.main(["--steps", "40", "--tests", "200", "--repeats", "0"]))
