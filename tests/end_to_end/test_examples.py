"""The examples run, stay short, and show what they are for: smoothing lowers the error of int8."""

import importlib.util
from pathlib import Path

import jax
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.huggingface
@pytest.mark.filterwarnings("default::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "unsmoothed", "smoothed"),
    [
        ("huggingface_flax", "unsmoothed", "smoothed"),
        ("nnx_model", "int8", "smoothed int8"),
        ("scanned_model", "int8", "smoothed int8"),
    ],
)
@pytest.mark.slow
@pytest.mark.each_case
def test_an_example_runs_and_smoothing_helps(name, unsmoothed, smoothed, capsys):
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) < 60
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    with jax.numpy_rank_promotion("allow"):
        spec.loader.exec_module(module)
        errors = module.main()
    assert 0 < errors[smoothed] < 0.6 * errors[unsmoothed]
    assert errors.get("float", 0) < 1e-5
    assert "error" in capsys.readouterr().out
