"""The command line: what each command writes and says, recipes, refusals, exit codes."""

import json
import os
import signal
import subprocess
import sys
import types
import weakref
from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint
import yaml
from click.testing import CliRunner
from tiny_speaker import END, write_speaker

import sqjax as sq
from sqjax.choosing.recommend import RECIPES, Recommendation, Tried
from sqjax.commands import cli
from sqjax.commands.calibrating import read_stats
from sqjax.commands.defaults import GGUF_SCHEMES, SCHEMES
from sqjax.commands.outputs import check_output, new_file
from sqjax.commands.recipes import digest_at
from sqjax.commands.recommending import text_of
from sqjax.commands.texts import read_texts
from sqjax.weights.quant_weight import is_quantized
from sqjax.weights.schemes import PRESETS, Indices
from sqjax.weights.sizes import weight_bytes

TEXT = "A quick brown fox jumps over a lazy dog, and the dog barks at the fox. " * 12
COMMANDS = (
    "quantize",
    "recommend",
    "eval",
    "generate",
    "compare",
    "inspect",
    "report",
    "calibrate",
    "smooth",
    "rotate",
)
COMMANDS += ("export", "demo", "bench")
#: How much the tests read.
FEW = ["--tokens", "32", "--windows", "3", "--quiet"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the checkpoint "tiny" and a text, the working directory of these tests."""
    folder = tmp_path_factory.mktemp("cli")
    write_speaker(folder / "tiny")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(autouse=True)
def in_place(place, monkeypatch):
    monkeypatch.chdir(place)


@pytest.fixture
def run(capsys):
    """Runs a command that goes well, and gives what it printed to stdout."""

    def run(*arguments):
        status = cli.main([str(x) for x in arguments])
        out, err = capsys.readouterr()
        assert status == 0, err
        return out

    return run


@pytest.fixture
def refusal(capsys):
    """Runs a command that is refused, and gives its one line on stderr."""

    def refusal(*arguments, status=2):
        assert cli.main([str(x) for x in arguments]) == status
        out, err = capsys.readouterr()
        assert out == ""
        lines = [line for line in err.splitlines() if line.startswith("sqjax: ")]
        assert lines == err.splitlines()[-1:], err
        assert "Traceback" not in err
        return lines[0]

    return refusal


def loaded(path):
    return sq.models.load(path)


def files_in(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


@pytest.fixture(scope="module")
def stats(place):
    """A file of statistics that `sqjax calibrate` wrote."""
    arguments = ["calibrate", place / "tiny", "--text", place / "text.txt", *FEW]
    assert cli.main([*map(str, arguments), "-o", str(place / "stats")]) == 0
    return place / "stats"


@pytest.fixture(scope="module")
def quantized(place, stats):
    """A directory that `sqjax quantize` wrote."""
    arguments = [place / "tiny", "--stats", stats, "--rule", "q_proj=none", "--quiet"]
    made = place / "tiny-w8a8"
    assert cli.main(["quantize", *map(str, arguments), "-o", str(made)]) == 0
    return made


# Help ---------------------------------------------------------------------------------------------


def test_help_imports_no_jax():
    code = (
        "import sys; from sqjax.commands import cli; status = cli.main(['quantize', '--help']); "
        "print(status, [m for m in ('jax', 'numpy', 'yaml', 'tqdm', 'flax') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert done.stderr == ""


def test_the_help_lists_the_commands():
    result = CliRunner().invoke(cli.sqjax, ["--help"])
    listed = result.output.partition("Commands:\n")[2]
    assert [line.split()[0] for line in listed.splitlines()] == list(COMMANDS)
    assert "..." not in listed


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "bench"])
def test_every_help_has_examples_that_parse(name):
    result = CliRunner().invoke(cli.sqjax, [name, "--help"])
    assert result.exit_code == 0
    examples = result.output.partition("Examples:\n")[2].splitlines()
    assert examples
    assert all(line.split()[0] == "sqjax" for line in examples)
    assert {"--json", "--quiet"} <= set(result.output.split())


def test_the_help_says_what_each_scheme_is():
    said = CliRunner().invoke(cli.sqjax, ["quantize", "--help"]).output
    table = said.partition("SCHEME is one of")[2].partition("Options:")[0]
    named = {word.rstrip(",") for word in table.split()}
    assert {*SCHEMES, *GGUF_SCHEMES} <= named
    assert "Usage: sqjax quantize [OPTIONS] [MODEL]" in said
    for name, windows in {"quantize": 16, "eval": 24, "compare": 24}.items():
        said = " ".join(CliRunner().invoke(cli.sqjax, [name, "--help"]).output.split())
        assert f"[default: the first {windows}, or" in said


def test_without_arguments_the_help_is_shown(capsys):
    assert cli.main([]) == 2
    assert "Commands:" in capsys.readouterr().err


def test_the_schemes_are_those_of_the_library():
    assert {name.upper() for name in SCHEMES} == set(PRESETS)
    for name, quantizes_activations in SCHEMES.items():
        scheme = PRESETS[name.upper()]
        is_activation = scheme.activation is not None and scheme.activation != Indices()
        assert quantizes_activations == is_activation
    assert GGUF_SCHEMES == ("q8_0", "q4_0", "q4_1")


# What commands make -------------------------------------------------------------------------------


def by_hand(model, params, rules, alpha):
    """What `quantize` shall write: the library's own steps on the same windows of the text."""
    ids = np.asarray(model.tokenizer.encode(TEXT)[:96]).reshape(3, 1, 32)
    return sq.smoothquant(model.apply, params, list(ids), alpha, rules)


@pytest.mark.slow
def test_quantize_writes_what_the_library_makes(quantized):
    model, params = loaded("tiny")
    expected = by_hand(model, params, {"q_proj": None, ".*": sq.W8A8}, 0.5)
    again, tree = loaded(quantized)
    assert again == model
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, tree, expected))


def test_a_recipe_makes_the_same_file_again(run):
    # A GGUF file that is not smoothed needs no calibration, so this is quick.
    made = ["--format", "gguf", "--scheme", "Q4_0", "-o", "one.gguf", "--quiet", "--json"]
    record = json.loads(run("quantize", "tiny", *made))
    assert (record["scheme"], record["alpha"], record["text"]) == ("q4_0", None, None)
    assert record["weight_bytes"] == Path("one.gguf").stat().st_size < record["float_bytes"]
    said = run("quantize", "--recipe", "one.gguf.recipe.yaml", "-o", "two.gguf", "--quiet")
    assert said == "two.gguf: q4_0, not smoothed, 0 MB to 0 MB\n"
    for name in ("{}.gguf", "{}.gguf.recipe.yaml"):
        one, two = (Path(name.format(x)).read_bytes() for x in ("one", "two"))
        assert one == two
    run("quantize", "--recipe", "one.gguf.recipe.yaml", "--scheme", "q8_0", "-o", "three.gguf")
    assert Path("three.gguf").stat().st_size > Path("two.gguf").stat().st_size


@pytest.mark.slow
def test_a_recipe_makes_the_same_bytes_again(quantized, run):
    recipe = quantized / "recipe.yaml"
    said = yaml.safe_load(recipe.read_text())
    assert said["command"] == "quantize"
    assert said["rule"] == ["q_proj=none"]
    # What was not given is said too, because another version may take something else.
    assert (said["scheme"], said["alpha"], said["format"]) == ("w8a8", 0.5, "sqjax")
    assert said["made_with"]["jax"] == jax.__version__
    run("quantize", "--recipe", recipe, "-o", "again", "--quiet")
    assert files_in("again") == files_in(quantized)


@pytest.mark.slow
def test_options_win_over_a_recipe(quantized, run):
    recipe = quantized / "recipe.yaml"
    made = ["-o", "w8a16", "--json", "--quiet"]
    out = run("quantize", "--recipe", recipe, "--scheme", "w8a16", "--alpha", "none", *made)
    record = json.loads(out)
    assert (record["scheme"], record["alpha"]) == ("w8a16", None)
    assert record["rules"] == {"q_proj": "none"}
    kernel = loaded("w8a16")[1]["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    assert kernel.activations is None
    assert record["weight_bytes"] < 0.6 * record["float_bytes"]


@pytest.mark.slow
def test_quantize_searches_as_the_library_does(run, refusal, stats):
    run("calibrate", "tiny", "--search", "--text", "text.txt", *FEW, "-o", "kept")
    made = ["--scheme", "w4a16_g64", "--search", "--stats", "kept", "--quiet"]
    record = json.loads(run("quantize", "tiny", *made, "-o", "searched", "--json"))
    assert (record["search"], record["alpha"]) == (True, None)
    _, params = loaded("tiny")
    expected = sq.quantize_by_search(params, sq.load("kept"), sq.W4A16_G64)
    jax.tree.map(np.testing.assert_array_equal, loaded("searched")[1], expected)
    said = run("quantize", "--recipe", "searched/recipe.yaml", "-o", "sought", "--quiet")
    assert said.startswith("sought: w4a16_g64, searched, ")
    assert files_in("sought") == files_in("searched")
    alone = refusal("quantize", "tiny", "--search", "--stats", stats, "-o", "x")
    assert "expected statistics for --search" in alone


@pytest.mark.slow
def test_a_static_range_after_a_rotation_is_calibrated_with_a_sample(run, refusal, stats):
    made = ["quantize", "tiny", "--scheme", "w8a16", "--rule", "down_proj=w8a8_o3_rotated"]
    run(*made, "--text", "text.txt", *FEW, "-o", "rotated", "--quiet")
    kernel = loaded("rotated")[1]["model"]["layers"]["0"]["mlp"]["down_proj"]["kernel"]
    assert kernel.rotation == kernel.shape[0]
    assert "static ranges after a rotation" in refusal(*made, "--stats", stats, "-o", "x")


@pytest.mark.slow
def test_recommend_writes_what_it_names(run, refusal, monkeypatch):
    for name in ("mixed", "w8a8 static rotated", "w4a8"):  # test_recommend has them
        monkeypatch.delitem(RECIPES, name)
    read = ["--text", "text.txt", "--tokens", "32", "--windows", "8", "--quiet"]
    out = run("recommend", "tiny", *read, "--budget", "50", "-o", "small", "--json")
    record = json.loads(out)
    sizes = [one["weight_bytes"] for one in record["tried"]]
    assert len(sizes) == 4
    assert sizes == sorted(sizes)
    [named] = [one for one in record["tried"] if one["recipe"] == record["recommended"]]
    assert weight_bytes(loaded("small")[1]) == named["weight_bytes"] < record["float_bytes"]
    assert named["loss_difference"] + named["interval"] <= record["budget"] == np.log(1.5)
    said = refusal("recommend", "tiny", *read, "--windows", "2")
    assert "expected 3 windows of text or more, 2 of which judge, got 2" in said


def test_recommend_says_what_none_is_within():
    tried = Tried("w8a8", 25_000_000, loss=1.0, difference=0.02, interval=0.01, rules=sq.W8A8)
    found = Recommendation(None, {}, None, (tried,), 0.98, 100_000_000, np.log(1.01))
    assert text_of(found, 1, None).splitlines() == [
        "    size  perplexity  more than float",
        "  100 MB       2.664                   float",
        "   25 MB       2.718  +2.02% +- 1.00%  w8a8",
        "no recipe is within 1%: accept more with --budget, or judge on more windows with --windows",
    ]
    starred = text_of(found._replace(name="w8a8"), 5, Path("new")).splitlines()
    assert starred[2] == "*   25 MB       2.718  +2.02% +- 1.00%  w8a8"
    assert starred[3:] == ["the smallest within 5%: w8a8", "written to new"]


@pytest.mark.slow
def test_statistics_serve_python_too(stats):
    found = sq.load(stats)
    model, params = loaded("tiny")
    ids = np.asarray(model.tokenizer.encode(TEXT)[:96]).reshape(3, 1, 32)
    expected = sq.calibrate(model.apply, params, list(ids))
    path = "model/layers/0/mlp/down_proj/kernel"
    np.testing.assert_array_equal(found.absmax[path], expected.absmax[path])
    assert found.graph == expected.graph
    assert (stats.parent / "stats.recipe.yaml").is_file()


@pytest.mark.slow
def test_rotate_computes_the_same(run):
    made = json.loads(run("rotate", "tiny", "--seed", "1", "-o", "turned", "--json", "--quiet"))
    (model, params), (same, turned) = loaded("tiny"), loaded("turned")
    ids = jnp.arange(24, dtype=jnp.int32)[None] % model.config.vocab_size
    expected = jax.jit(model.apply)(params, ids)
    np.testing.assert_allclose(jax.jit(same.apply)(turned, ids), expected, rtol=1e-4, atol=1e-4)
    table = ("model", "embed_tokens", "embedding")
    before, after = at(params, table), at(turned, table)
    # Rows are turned, and so as long as they were.
    assert not np.allclose(after, before)
    np.testing.assert_allclose(*(np.linalg.norm(x, axis=1) for x in (after, before)), rtol=1e-4)
    assert made["untied"] == model.config.tie_embeddings
    assert made["spaces"] == 1 + model.config.num_layers  # the residual, and v -> o of each layer
    assert run("inspect", "turned", "--quiet")


@pytest.mark.slow
def test_rotate_turns_an_encoder_too(run):
    tiny_checkpoint.write(tiny_checkpoint.load("modernbert", "encoders"), Path("encoder"))
    made = json.loads(run("rotate", "encoder", "-o", "turned_encoder", "--json", "--quiet"))
    assert made["spaces"] > 0
    assert made["untied"] is False
    (model, params), (same, turned) = map(sq.models.load_encoder, ("encoder", "turned_encoder"))
    inputs = jnp.arange(12, dtype=jnp.int32)[None], jnp.ones((1, 12), bool)
    got, want = (jax.jit(m.embed)(p, *inputs) for m, p in ((same, turned), (model, params)))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    values = ("model", "layers", "0", "self_attn", "v_proj", "kernel")
    assert not np.allclose(at(turned, values), at(params, values))


def test_smooth_computes_the_same(run, stats):
    run("smooth", "tiny", "--alpha", "0.8", "--stats", stats, "-o", "smooth", "--quiet")
    model, params = loaded("tiny")
    same, smooth = loaded("smooth")
    ids = jnp.asarray([same.tokenizer.encode("The dog barks.")])
    expected = jax.jit(model.apply)(params, ids)
    np.testing.assert_allclose(jax.jit(same.apply)(smooth, ids), expected, rtol=1e-4, atol=1e-4)
    norm = ["model", "layers", "0", "input_layernorm", "weight"]
    assert not np.allclose(at(smooth, norm), at(params, norm))


def at(tree, keys):
    for key in keys:
        tree = tree[key]
    return tree


def log_probabilities(path, windows):
    """float64 log-probabilities of the next tokens, by numpy: (windows, places, vocabulary)."""
    model, params = loaded(path)
    logits = jax.jit(sq.quantized(model.apply))(params, windows)
    logits = np.asarray(logits, np.float64)[:, :-1]
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@pytest.mark.slow
def test_eval_and_compare_measure_what_numpy_does(run, quantized):
    model, _ = loaded("tiny")
    windows = np.asarray(model.tokenizer.encode(TEXT)[:96]).reshape(3, 32)
    first, second = (log_probabilities(path, windows) for path in ("tiny", quantized))
    following = windows[:, 1:, None]
    losses = [-np.take_along_axis(x, following, -1)[..., 0] for x in (first, second)]

    given = ["--text", "text.txt", *FEW, "--json"]
    found = json.loads(run("compare", "tiny", quantized, *given))
    difference = (losses[1] - losses[0]).mean(axis=1)
    assert found["perplexity"] == pytest.approx(np.exp(losses[0].mean()), rel=1e-5)
    assert found["other_perplexity"] == pytest.approx(np.exp(losses[1].mean()), rel=1e-5)
    assert found["loss_difference"] == pytest.approx(difference.mean(), rel=1e-2, abs=1e-5)
    error = difference.std(ddof=1) / 3**0.5
    assert found["standard_error"] == pytest.approx(error, rel=1e-2, abs=1e-5)
    same = (first.argmax(-1) == second.argmax(-1)).mean()
    assert found["same_token"] == pytest.approx(same, abs=1e-6)
    kl = (np.exp(first) * (first - second)).sum(-1).mean()
    assert found["kl"] == pytest.approx(kl, rel=1e-2)
    assert 0 < kl < 0.1

    found = json.loads(run("eval", quantized, "--against", "tiny", *given))
    assert found["perplexity"] == pytest.approx(np.exp(losses[1].mean()), rel=1e-5)
    ratio = np.exp(losses[1].mean() - losses[0].mean())
    assert found["ratio"] == pytest.approx(ratio, rel=1e-5)


@pytest.mark.slow
def test_eval_reads_the_text_behind_a_prefix_as_well(run, quantized):
    """The prefix of a quantized model is that of the floats that its codes stand for."""
    given = ["--text", "text.txt", *FEW]
    found = json.loads(
        run("eval", quantized, "--against", "tiny", "--prefix", "5, 3", *given, "--json")
    )
    for row, path in ((found, quantized), (found["against"], "tiny")):
        model, params = loaded(path)
        floats = jax.tree.map(
            lambda x: x.dequantize() if is_quantized(x) else x, params, is_leaf=is_quantized
        )
        windows = np.asarray(model.tokenizer.encode(TEXT)[:96]).reshape(3, 32)
        prefix = sq.models.prefix(model, floats, ids=[5, 3])
        expected = sq.models.perplexity(model, params, windows, prefix=prefix)
        assert row["prefix"] == {"ids": [5, 3], "perplexity": pytest.approx(expected, rel=1e-5)}
        assert row["perplexity"] != pytest.approx(expected, rel=1e-4)
    own, theirs = found["prefix"]["perplexity"], found["against"]["prefix"]["perplexity"]
    assert found["prefixed_ratio"] == pytest.approx(own / theirs)
    assert found["prefixed_ratio_to_plain"] == pytest.approx(own / found["against"]["perplexity"])
    lines = run("eval", "tiny", "--prefix", "5,3", *given).splitlines()
    assert lines[1] == f"perplexity {theirs:.3f}  behind the prefix 5,3  tiny"


@pytest.mark.slow
def test_tasks_are_asked_of_the_harness(run, monkeypatch):
    """The harness is a stand-in here: it asks one question, and gives scores in its own form."""
    harness, base = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.api.model")
    base.LM = type("LM", (), {})

    def simple_evaluate(model, tasks, limit):
        assert isinstance(model, base.LM)
        request = types.SimpleNamespace(args=("The dog", " barks"))
        [(score, _)] = model.loglikelihood([request])
        return {"results": {name: {"alias": name, "acc,none": score} for name in tasks}}

    harness.simple_evaluate = simple_evaluate
    modules = {"lm_eval": harness, "lm_eval.api": harness, "lm_eval.api.model": base}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    found = json.loads(run("eval", "tiny", "--tasks", "a,b", "--limit", "2", "--json", "--quiet"))
    assert found["results"]["a"] == found["results"]["b"]
    assert found["results"]["a"]["acc,none"] < 0
    assert found["results"]["a"].keys() == {"acc,none"}


def test_a_model_is_as_itself(run):
    text = ["--text", "text.txt", *FEW]
    found = json.loads(run("compare", "tiny", "tiny", *text, "--json"))
    assert (found["kl"], found["loss_difference"], found["standard_error"]) == (0, 0, 0)
    assert found["same_token"] == 1


@pytest.mark.slow
def test_generate_streams_what_the_library_generates(run, quantized):
    model, params = loaded(quantized)
    raw = sq.models.generate(model, params, "The dog", 8)
    said = run("generate", quantized, "The dog", "--raw", "--max-tokens", "8", "--quiet")
    # A character that has not ended is not shown.
    assert said.rstrip("\n") == raw.texts[0].rstrip("\ufffd")
    found = json.loads(
        run("generate", quantized, "The dog", "--max-tokens", "8", "--quiet", "--json")
    )
    message = [{"role": "user", "content": "The dog"}]
    ids = model.tokenizer.encode_chat(message)
    chat = sq.models.generate(model, params, [ids], 8)
    assert found["chat"] is True
    assert found["text"] == chat.texts[0].rstrip("\ufffd") != said.rstrip("\n")
    assert found["tokens"] == len(chat.tokens[0])


@pytest.mark.slow
def test_inspect_says_what_is_there(run, quantized, stats):
    found = json.loads(run("inspect", "tiny", "--stats", stats, "--quiet", "--json"))
    assert (found["layers"], found["channels"], len(found["sites"])) == (1, 32, 8)
    assert "outliers" in run("inspect", "tiny", "--stats", stats, "--quiet").lower()
    found = json.loads(run("inspect", quantized, "--quiet", "--json"))
    assert len(found["quantized"]) == 7
    assert {*found["quantized"].values()} == {"int8 weight, int8 activations, per token"}


@pytest.mark.slow
def test_report_is_one_page(run, stats):
    how = ["--stats", stats, "--tokens", "32", "--eval-windows", "2", "--prompt", "The dog"]
    said = run("report", "tiny", *how, "-o", "report.html", "--quiet")
    page = Path("report.html").read_text()
    lines = said.splitlines()
    assert lines[0] == "report.html: W8A8, on 2 x 32 tokens"
    assert [line.split()[0] for line in lines[1:]] == ["perplexity"] * 3
    assert [line.split()[-1] for line in lines[1:]] == ["float", "unsmoothed", "smoothed"]
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert Path("report.html.recipe.yaml").is_file()


@pytest.mark.slow
def test_export_writes_programs(run, quantized):
    how = ["--platform", "cpu", "--prompt", "8", "--length", "16"]
    said = run("export", quantized, *how, "-o", "said", "--quiet")
    assert said.endswith(" new ones: python said/run.py 16 1,2,3\n")
    found = json.loads(run("export", quantized, *how, "-o", "programs", "--quiet", "--json"))
    assert {"run.py", "prefill.bin", "decode.bin", "weights.safetensors"} <= {*found["files"]}
    assert {*os.listdir("programs")} == {*found["files"], "recipe.yaml"}


@pytest.mark.slow
def test_other_formats_are_models_again(run, stats):
    given = ["--stats", stats, "--quiet"]
    others = {"ct": "compressed-tensors", "tiny.gguf": "gguf"}
    for output, layout in others.items():
        run("quantize", "tiny", *given, "--format", layout, "-o", output)
        model, params = loaded(output)
        same, floats = loaded("tiny")
        ids = jnp.asarray([same.tokenizer.encode("The dog barks.")])
        got = jax.jit(sq.quantized(model.apply))(params, ids)
        expected = np.asarray(jax.jit(same.apply)(floats, ids))
        error = np.abs(got - expected).max() / np.abs(expected).max()
        assert 0 < error < 0.1


def test_export_says_first_what_it_needs(refusal, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    # "nowhere" is no model, but this is said before it is looked for.
    assert "pip install 'sqjax[export]'" in refusal("export", "nowhere", "-o", "x")


# Texts --------------------------------------------------------------------------------------------


def test_texts_of_files_folders_and_lines(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n\n"three"\n')
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    (tmp_path / "d.txt").mkdir()
    assert read_texts(tmp_path, "calibration").texts == ["one", "two", "three"]
    assert read_texts(tmp_path / "a.txt", "calibration").texts == ["one"]
    shipped = read_texts(None, "evaluation")
    assert len(shipped.texts[0]) > 10_000
    assert "comes with sqjax" in shipped.name
    # JSON's texts may hold what ends lines elsewhere.
    (tmp_path / "b.jsonl").write_text('{"text": "a\u2028b\x85c"}\r\n"d"', "utf-8")
    assert read_texts(tmp_path / "b.jsonl", "calibration").texts == ["a\u2028b\x85c", "d"]
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n{"txt": "three"}\n')
    with pytest.raises(ValueError, match=r'b\.jsonl:2: expected \{"text": \.\.\.\}, got \[.txt.\]'):
        read_texts(tmp_path / "b.jsonl", "calibration")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"a\.txt: expected a text in UTF-8"):
        read_texts(tmp_path / "a.txt", "calibration")


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantise", "tiny"], "No such command 'quantise'"),
        (["quantize", "tiny"], "Missing option '-o'"),
        (["quantize", "tiny", "-o", "x", "--scheme", "w3a3"], "'w3a3' is not one of 'w8a8'"),
        (["quantize", "tiny", "-o", "x", "--alpha", "2"], "strength from 0 to 1, or none, got '2'"),
        (
            ["quantize", "tiny", "-o", "x", "--rule", "q_proj"],
            "expected PATTERN=SCHEME with one of",
        ),
        (["quantize", "tiny", "-o", "x", "--scheme", "q8_0"], "for --format sqjax, got q8_0"),
        (
            ["quantize", "tiny", "-o", "x", "--format", "gguf"],
            "x: --format gguf writes one file. G",
        ),
        (["quantize", "tiny", "-o", "x.gguf"], "a name that ends with .gguf is for --format gguf"),
        (
            ["quantize", "tiny", "-o", "x", "--search", "--alpha", "0.5"],
            "--search: expected it without --alpha",
        ),
        (
            ["quantize", "tiny", "-o", "x.gguf", "--format", "gguf", "--search"],
            "--search: expected it without --format gguf",
        ),
        (["recommend", "tiny", "--force"], "--force: expected it with --output"),
        (["recommend", "tiny", "--budget", "-1"], "-1.0 is not in the range x>=0"),
        (["quantize", "nowhere", "-o", "x"], "nowhere: no such path; expected smollm2-135m"),
        (["quantize", "text.txt", "-o", "x"], "got another kind of file"),
        (["quantize", "tiny", "-o", "no/x"], "expected a path in a folder that exists"),
        (["quantize", "tiny", "-o", "tiny", "--force"], "does not hold tiny, which is read"),
        (["quantize", "tiny", "-o", "text.txt"], "text.txt: it is there already; pass --force"),
        (["smooth", "tiny", "-o", "tiny"], "does not hold tiny, which is read"),
        (["eval", "tiny", "--text", "no.txt"], "Path 'no.txt' does not exist"),
        (
            ["eval", "tiny", "--text", "text.txt", "--tokens", "1024"],
            "--tokens: expected at most 64,",
        ),
        (["eval", "tiny", "--text", "text.txt", "--windows", "999"], "got 999"),
        (["eval", "tiny", "--windows", "four"], "expected a whole number, got 'four'"),
        (["eval", "tiny", "--windows", "0"], "0 is not in the range x>=1"),
        (["export", "tiny", "-o", "x", "--length", "128"], "--length: expected more than --prompt"),
        (["export", "tiny", "-o", "x"], "--length: expected at most 64, which"),
        (["report", "tiny", "-o", "x", "--alphas", "none"], "--alphas: expected a number"),
        (["eval", "tiny", "--prefix", "first"], "--prefix: expected auto, or token ids"),
        (
            ["eval", "tiny", "--prefix", "auto", "--text", "text.txt", *FEW],
            "--prefix auto: tiny: prefix: expected tokens whose activations are above",
        ),
        (["eval", "tiny", "--prefix", "1", "--text", "text.txt"], "give a smaller --tokens"),
        (["eval", "tiny", "--prefix", "9999", "--text", "text.txt"], "prefix: ids"),
        (["eval", "tiny", "--prefix", "auto", "--tasks", "a"], "--prefix and --against"),
        (["eval", "tiny", "--limit", "3"], "--limit: expected it with --tasks"),
        (["eval", "tiny", "--tasks", "arc_easy"], "pip install 'sqjax[eval]'"),
        (["generate", "tiny", "Hi", "--max-tokens", "64"], "the model takes 64 in all"),
        (["generate", "tiny", "Hi", "--seed", "a"], "'a' is not a valid integer"),
        (["generate", "tiny", "Hi", "--temperature", "hot"], "'hot' is not a valid number"),
        (["generate", "tiny", ""], "PROMPT: expected a text, got an empty one"),
        (["demo", "--model", "no/such/model"], "no/such/model"),
        (["bench", "decode", "--only", "size"], "'size' is not one of 'accuracy', 'speed'"),
    ],
)
def test_bad_input_is_one_line(refusal, arguments, said):
    assert said in refusal(*arguments)
    assert not Path("x").exists()


NOTHING = "expected a text, got nothing but spaces"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["calibrate", "tiny", "--text", "empty.txt", "-o", "x"], NOTHING),
        (["quantize", "tiny", "--text", "lines.jsonl", "-o", "x"], 'expected {"text": ...}'),
        (["smooth", "tiny", "--text", "empty", "-o", "x"], "expected a folder of texts"),
        (["inspect", "tiny", "--text", "empty.txt"], NOTHING),
        (["report", "tiny", "--eval-text", "empty.txt", "-o", "x"], NOTHING),
        (["eval", "tiny", "--against", "empty"], "a directory without config.json"),
        (["compare", "tiny", "tinny"], "tinny: no such path"),
        (["inspect", "tiny", "--stats", "text.txt"], "--stats: text.txt: expected a file that"),
        (["inspect", "tiny", "--stats", "text.txt", "--text", "text.txt"], "without --text"),
    ],
)
def test_wrong_inputs_are_found_before_a_model_is_loaded(
    refusal, monkeypatch, place, arguments, said
):
    (place / "empty").mkdir(exist_ok=True)
    (place / "empty.txt").write_text(" ")
    (place / "lines.jsonl").write_text('{"txt": "a"}')

    def loads(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("sqjax.models.load", loads)
    assert said in refusal(*arguments)


def test_eval_holds_one_model_at_a_time(run, monkeypatch):
    held = []

    def opens(name, *_):
        assert all(one() is None for one in held)
        weights = np.zeros(2)
        held.append(weakref.ref(weights))
        return types.SimpleNamespace(model=loaded_model, params=weights)

    loaded_model = sq.models.load("tiny")[0]
    monkeypatch.setattr("sqjax.commands.model_argument.open_decoder", opens)
    monkeypatch.setattr("sqjax.models.perplexity", lambda *_, **__: 2.0)
    run("eval", "tiny", "--against", "tiny", "--text", "text.txt", *FEW)
    assert len(held) == 2


@pytest.mark.slow
def test_what_starts_from_floats_refuses_a_quantized_model(refusal, quantized):
    said = refusal("quantize", quantized, "-o", "x")
    assert "starts from float weights, got quantized ones" in said


def test_a_hub_id_without_a_network_is_one_line(refusal, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def no_network(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(hub, "snapshot_download", no_network)
    said = refusal("inspect", "HuggingFaceTB/SmolLM2-135M")
    assert "could not be fetched (ConnectionError: no route)" in said


def test_a_hub_id_is_fetched(run, monkeypatch, place):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: str(place / "tiny"))
    run("quantize", "someone/tiny", "--format", "gguf", "-o", "hub.gguf", "--quiet")
    assert yaml.safe_load(Path("hub.gguf.recipe.yaml").read_text())["model"] == "someone/tiny"


def test_recipes_are_checked(refusal, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    made = ["--recipe", recipe, "-o", "x"]

    def refused(text):
        recipe.write_text(text)
        return refusal("quantize", *made)

    assert "got the key 'shceme'; did you mean scheme?" in refused("shceme: w8a8\nmodel: tiny\n")
    assert "expected a recipe of `sqjax quantize`, got one of `sqjax smooth`" in refused(
        "command: smooth\nmodel: tiny\n"
    )
    assert "expected a recipe such as" in refused("- w8a8\n")
    assert "recipe.yaml:2: expected a recipe in YAML: expected ',' or" in refused("scheme: [a\nb:")
    said = refused("scheme: w9\nmodel: tiny\n")
    assert "recipe.yaml: Invalid value for '--scheme': 'w9' is not one of" in said
    assert "alpha: expected a text or a number, got True" in refused("alpha: yes\nmodel: tiny\n")
    assert "Missing argument 'MODEL'" in refused("scheme: w8a8\n")
    made_of = "model: tiny\nalpha: none\nscheme: q8_0\nformat: gguf\nmade_of: 3\n"
    made[-1] = "x.gguf"
    assert "made_of: expected digests by name, got 3" in refused(made_of)


def test_statistics_may_be_a_directory(tmp_path):
    stats = sq.calibrate(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 2))}, [jnp.ones((1, 2))])
    sq.save(tmp_path / "stats", stats)
    assert read_stats(tmp_path / "stats").graph == stats.graph
    before = digest_at(tmp_path / "stats")
    assert before == digest_at(tmp_path / "stats")
    (tmp_path / "stats/sqjax.json").write_text("{}")
    assert before != digest_at(tmp_path / "stats")


def test_a_recipe_of_another_text_is_refused(refusal, run, tmp_path):
    text, recipe = tmp_path / "text.txt", tmp_path / "recipe.yaml"
    text.write_text(TEXT)
    made_of = {"text": read_texts(text, "evaluation").digest}
    said = {"model": "tiny", "text": str(text), "made_of": made_of, "tokens": 32, "windows": 1}
    recipe.write_text(yaml.safe_dump(said))
    again = ["eval", "--recipe", recipe, "--quiet"]
    run(*again)
    text.write_text(TEXT[1:])
    assert "expected the text that the recipe was made of" in refusal(*again)
    # One that is named on the line is meant.
    run(*again, "--text", text)


# Outputs ------------------------------------------------------------------------------------------


def test_what_is_there_is_replaced_by_force_and_if_it_is_ours(tmp_path, monkeypatch):
    out, reads = tmp_path / "out", (None, "smollm2-135m")

    def check(force):
        check_output(out, force, directory=True, reads=reads)

    check(False)
    out.mkdir()
    check(False)  # many make a directory first
    (out / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="out: it is there already; pass --force"):
        check(False)
    with pytest.raises(ValueError, match=r"got a directory without recipe\.yaml"):
        check(True)
    (out / "thesis.tex").rename(out / "recipe.yaml")
    check(True)
    (out / "src").mkdir()
    with pytest.raises(ValueError, match=r"got a directory that holds \['src'\]"):
        check(True)
    # The folders that a model of sentence-transformers has are its own.
    (out / "modules.json").write_text('[{"path": "src"}]')
    check(True)
    (out / "src").rmdir()
    for directory in (True, False):
        with monkeypatch.context() as there:
            there.chdir(out)
            with pytest.raises(ValueError, match="does not hold the working directory"):
                check_output(Path(), True, directory=directory, reads=())
    with pytest.raises(ValueError, match="expected a file to replace, got something else"):
        check_output(out, True, directory=False, reads=())
    # The recipe of a file is beside it, and not replaced either.
    (tmp_path / "stats.recipe.yaml").write_text("command: calibrate")
    with pytest.raises(ValueError, match=r"stats\.recipe\.yaml: it is there already"):
        check_output(tmp_path / "stats", False, directory=False, reads=())


def test_a_link_stays_a_link(tmp_path):
    """What it leads to is written, and its recipe is beside that."""
    (tmp_path / "far").mkdir()
    link, real = tmp_path / "link", tmp_path / "far/real"
    link.symlink_to(real)
    with click.Context(cli.sqjax), new_file(link, {}) as new:
        new.write_text("result")
    assert link.is_symlink()
    assert real.read_text() == "result"
    assert sorted(os.listdir(tmp_path / "far")) == ["real", "real.recipe.yaml"]
    link.unlink()
    link.symlink_to(tmp_path / "nowhere/real")
    with pytest.raises(ValueError, match=r"a path in a folder that exists; make .*nowhere"):
        check_output(link, True, directory=False, reads=())


@pytest.mark.slow
def test_force_replaces_the_directory_as_a_whole(run, stats, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "recipe.yaml").write_text("old")
    (out / "model-00002-of-00002.safetensors").write_text("old")
    made = ["--stats", stats, "--quiet", "--format", "compressed-tensors", "--force", "-o", out]
    run("quantize", "tiny", *made)
    assert {"config.json", "model.safetensors", "recipe.yaml"} <= set(os.listdir(out))
    assert "model-00002-of-00002.safetensors" not in os.listdir(out)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (OSError("full"), 2)])
def test_nothing_is_left_half_written(refusal, tmp_path, monkeypatch, error, status):
    def half(directory, *_, **__):
        (Path(directory) / "half").write_text("half")
        raise error

    monkeypatch.setattr(sq.models, "export", half)
    old = tmp_path / "out"
    old.mkdir()
    (old / "recipe.yaml").write_text("old")
    said = refusal(
        "export", "tiny", "--length", 64, "--prompt", 8, "-o", old, "--force", status=status
    )
    assert said == ("sqjax: interrupted" if status == 130 else "sqjax: full")
    assert files_in(old) == {"recipe.yaml": b"old"}
    assert os.listdir(tmp_path) == ["out"]


def test_ctrl_c_ends_with_130():
    # A process that is started in the background ignores Ctrl-C, and so would what it starts.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from sqjax.commands.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", program, "generate", "tiny", "-"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr.readline() == "reading the prompt from stdin\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert err == "sqjax: interrupted\n"


@pytest.mark.slow
def test_a_process_says_its_result_on_stdout_alone(quantized):
    command = [sys.executable, "-m", "sqjax", "inspect", quantized, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert json.loads(done.stdout)["kind"] == "a decoder"
    assert f"reading {quantized}" in done.stderr


def test_warnings_are_a_line(monkeypatch, capsys):
    import warnings

    def warn(*_, **__):
        warnings.simplefilter("always")
        warnings.warn("few\ntokens", stacklevel=1)
        raise ValueError("the end")

    monkeypatch.setattr("sqjax.commands.model_argument.open_model", warn)
    assert cli.main(["inspect", "tiny"]) == 2
    assert capsys.readouterr().err == "sqjax: warning: few tokens\nsqjax: the end\n"
    assert END
