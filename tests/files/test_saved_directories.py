"""A save as a directory of shards: bit for bit, and what is damaged, mixed up or half there is refused."""

import functools
import json
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from untyped import untyped

import sqjax as sq
from sqjax.files import shards
from sqjax.files.checksums import seal_of

posix = pytest.mark.skipif(os.name != "posix", reason="limits, modes and signals are POSIX's")


def fn(params, x):
    return (x * params["norm"][None]) @ params["w"]


@functools.cache
def calibrated():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)
    params = {"norm": jnp.linspace(0.5, 2, 8), "w": w}
    stats = sq.calibrate(fn, params, [jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)])
    return params, stats, sq.quantize(params, stats, sq.W4A16)


def everything():
    """A tree of what files hold in other ways than memory, and ordinary leaves."""
    rng = np.random.default_rng(1)
    return {
        "q": calibrated()[2],
        "half": jnp.asarray(rng.normal(size=(3, 5)), jnp.bfloat16),
        "e4m3": jnp.asarray(rng.normal(size=7), jnp.float8_e4m3fn),
        "int4": jnp.arange(-8, 7, dtype=jnp.int4).reshape(5, 3),
        "scalar": jnp.asarray(3, jnp.int32),
        "empty": [jnp.zeros((0, 3)), None, ()],
        "swapped": np.arange(3, dtype=">f4"),
        "layers": {2: jnp.arange(4), 10: jnp.asarray([jnp.nan, jnp.inf])},
    }


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array)
        assert (a.dtype.name, a.shape) == (b.dtype.name, b.shape)
        own = np.asarray(b).astype(np.asarray(a).dtype, copy=False)
        assert np.asarray(a).tobytes() == own.tobytes()


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


# What comes back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 60, 10_000])
def test_a_tree_comes_back_from_shards(tmp_path, size):
    tree = everything()
    sq.save(tmp_path / "w4", tree, max_shard_bytes=size)
    assert_same(sq.load(tmp_path / "w4"), tree)
    index, *shards = names_in(tmp_path / "w4")[::-1]
    assert index == "sqjax.json"
    tensors = json.loads((tmp_path / "w4/sqjax.json").read_text())["shards"]
    held = [len(x["tensors"]) for x in tensors.values()]
    assert sorted(tensors) == sorted(shards)
    # One for each array, some for each shard, all in one.
    arrays = len(jax.tree.leaves(tree))
    assert sum(held) == arrays
    assert {1: len(held) == arrays, 60: 1 < len(held) < arrays, 10_000: len(held) == 1}[size]


@pytest.mark.parametrize("name", ["all.safetensors", "all"])
def test_what_came_along_comes_back(tmp_path, name):
    params, stats, qparams = calibrated()
    config = {"alpha": 0.85, "rules": [["head", None]], "text": "\u00e9\n", "n": {"a": 1e-5}}
    sq.save(tmp_path / name, qparams, stats=stats, config=config, graph=stats.graph)
    saved = sq.load_saved(tmp_path / name)
    assert_same(saved.params, qparams)
    assert_same(saved.stats, stats)  # the graph is part of their structure
    assert (saved.config, saved.graph) == (config, stats.graph)
    assert_same(sq.load(tmp_path / name), qparams)
    assert_same(sq.smooth(params, saved.stats, 0.5), sq.smooth(params, stats, 0.5))
    sq.save(tmp_path / name, {"w": jnp.ones(2)})
    assert sq.load_saved(tmp_path / name)[1:] == (None, None, None)


def test_a_tree_like_the_saved_one(tmp_path):
    sq.save(tmp_path / "w", {"a": jnp.ones((2, 3))})
    assert_same(sq.load(tmp_path / "w", {"a": jnp.zeros((2, 3))}), {"a": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match=r"load: .*w: the file does not hold a tree like .*: a: "):
        sq.load(tmp_path / "w", {"a": jnp.zeros((3, 2))})


CONFIGS = {
    "a tuple": ({"a": (1, 2)}, "config: expected no tuples"),
    "a number as key": ({1: 2}, "config: expected no tuples, and keys that are texts"),
    "an array": ({"a": np.ones(2)}, "config: expected what JSON can hold .*ndarray"),
    "NaN": ({"a": float("nan")}, "config: expected what JSON can hold"),
    "no mapping": ([1], "config: expected JSON by name"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_would_not_come_back(tmp_path, case):
    config, message = CONFIGS[case]
    with untyped(), pytest.raises(ValueError, match=f"save: .*w: {message}"):
        sq.save(tmp_path / "w", {}, config=config)
    assert names_in(tmp_path) == []


def test_what_is_no_stats_and_no_graph(tmp_path):
    graph = calibrated()[1].graph
    with pytest.raises(ValueError, match=r"stats: expected the Stats that sqjax.calibrate gives"):
        sq.save(tmp_path / "w", {}, stats=graph)
    with pytest.raises(ValueError, match=r"graph: expected a Graph, such as stats.graph, got dict"):
        sq.save(tmp_path / "w", {}, graph={})
    with pytest.raises(ValueError, match="max_shard_bytes: expected a whole number of at least 1"):
        sq.save(tmp_path / "w", {}, max_shard_bytes=0)


# Paths --------------------------------------------------------------------------------------------


def test_a_name_decides_whether_a_file_or_a_directory_is_written(tmp_path):
    names = {"x.safetensors": True, "x.stats": True, "qwen": False, "Llama-3.2-1B-w8": False}
    for name, is_file in names.items():
        sq.save(tmp_path / name, {"a": jnp.ones(2)})
        assert (tmp_path / name).is_file() == is_file
    # What is there decides first.
    os.rename(tmp_path / "x.stats", tmp_path / "old")
    sq.save(tmp_path / "old", {"a": jnp.zeros(2)})
    assert (tmp_path / "old").is_file()
    assert_same(sq.load(tmp_path / "old"), {"a": jnp.zeros(2)})


@posix
def test_a_directory_that_is_saved_anew_while_it_is_opened(tmp_path, monkeypatch):
    """Its index is the old one's, its second shard the new one's: all of the new one is read."""
    tree = {"a": np.zeros(3, np.float32), "b": np.zeros(3, np.float32)}
    newer = {name: x + 1 for name, x in tree.items()}
    sq.save(tmp_path / "m", tree, max_shard_bytes=1)
    open_file, left = shards.open_file, [newer]

    def opened(path):
        if path.name.startswith("sqjax-00002") and left:
            sq.save(tmp_path / "m", left.pop(), max_shard_bytes=1)
        return open_file(path)

    monkeypatch.setattr(shards, "open_file", opened)
    assert sq.load(tmp_path / "m")["a"].tolist() == [1, 1, 1]
    assert not left


def test_a_directory_of_save_is_replaced_as_a_whole(tmp_path):
    sq.save(tmp_path / "w", everything(), max_shard_bytes=1)
    (tmp_path / "w").chmod(0o750)
    (tmp_path / "link").symlink_to("w")
    sq.save(tmp_path / "link", {"a": jnp.ones(2)})
    assert (tmp_path / "link").is_symlink()
    assert names_in(tmp_path / "w") == ["sqjax-00001-of-00001.safetensors", "sqjax.json"]
    assert stat.S_IMODE((tmp_path / "w").stat().st_mode) == 0o750
    assert names_in(tmp_path) == ["link", "w"]


@pytest.mark.parametrize("others", [["notes.txt"], ["sqjax.json", "config.json"]])
def test_a_directory_with_other_files_is_not_replaced(tmp_path, others):
    for name in others:
        (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="that holds what save wrote and nothing else, got one"):
        sq.save(tmp_path, {"a": jnp.ones(2)})
    assert [(tmp_path / name).read_text() for name in others] == ["mine"] * len(others)


# Damage -------------------------------------------------------------------------------------------


def shards_of_a_save(directory, seed=0):
    """A save with all parts, in shards of one or two arrays; the random numbers differ by seed."""
    rng = np.random.default_rng(seed)
    tree = {"a": rng.normal(size=4).astype(np.float32), "b": np.arange(5, dtype=np.int8)}
    tree["w"] = calibrated()[2]["w"]
    how = {"stats": calibrated()[1], "config": {"a": [1]}, "graph": calibrated()[1].graph}
    sq.save(directory, tree, max_shard_bytes=60, **how)
    return sorted(directory.glob("*.safetensors"))


def refusal(directory):
    """What `load` says of a directory; fails if it takes it."""
    with pytest.raises(ValueError, match=r"^load: ") as raised:
        sq.load(directory)
    text = str(raised.value)
    assert text.startswith(f"load: {directory}: ")
    return text.removeprefix(f"load: {directory}: ")


@pytest.mark.parametrize("flips", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_byte_that_changes_anywhere_is_refused(tmp_path, flips):
    """In the index and in each shard, headers and data: as often in one as in the other."""
    tree = {
        "a": np.ones(4, np.float32),
        "b": np.arange(9, dtype=np.int32),
        "c": calibrated()[2]["w"],
    }
    sq.save(tmp_path / "w", tree, config={"a": [1]}, max_shard_bytes=60)
    assert_same(sq.load(tmp_path / "w"), tree)
    files = sorted((tmp_path / "w").iterdir())
    assert len(files) == 3
    rng, missed = np.random.default_rng(flips), []
    for turn in range(flips):
        file = files[turn % 3]
        with file.open("rb+", buffering=0) as opened:
            where = int(rng.integers(file.stat().st_size))
            byte = os.pread(opened.fileno(), 1, where)
            other = bytes([byte[0] ^ int(rng.integers(1, 256))])
            os.pwrite(opened.fileno(), other, where)
            text = refusal(tmp_path / "w")
            if file.name not in text:
                missed.append((file.name, where, other, text))
            os.pwrite(opened.fileno(), byte, where)
    assert missed == []
    sq.load(tmp_path / "w")


def test_a_changed_array_is_named_with_its_file(tmp_path):
    first, *_ = shards_of_a_save(tmp_path / "w")
    raw = first.read_bytes()
    first.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    text = refusal(tmp_path / "w")
    assert text.startswith(
        f"{first.name}: w/tensor/values: expected an array with the checksum that it was"
    )


@pytest.mark.parametrize("file", [0, 1, 2, -1])
def test_a_truncated_file_is_refused(tmp_path, file):
    shards = shards_of_a_save(tmp_path / "w")
    file = [tmp_path / "w/sqjax.json", *shards][file]
    raw = file.read_bytes()
    for kept in (0, 7, 100, len(raw) // 2, len(raw) - 1):
        file.write_bytes(raw[:kept])
        assert refusal(tmp_path / "w").startswith(f"{file.name}: expected ")


def swapped(first, second):
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)


def of_another_save(directory, shard):
    """The shard of the same name and shapes of another save."""
    shards_of_a_save(directory.with_name("other"), seed=1)
    other = directory.with_name("other") / shard.name
    assert other.stat().st_size == shard.stat().st_size
    shard.write_bytes(other.read_bytes())


MIXED_UP = {
    "swapped": (lambda d, s: swapped(s[0], s[1]), r"{0}: expected the shard .*which holds a, b.*"),
    "missing": (lambda d, s: s[1].unlink(), r"{1}: expected this shard, which holds .*, got none"),
    "a directory": (
        lambda d, s: (s[0].unlink(), s[0].mkdir()),
        r".*/{0}: expected a file, got a dir",
    ),
    "of another save": (
        lambda d, s: of_another_save(d, s[0]),
        r"{0}: a: expected an array with the checksum",
    ),
    "no index": (
        lambda d, s: (d / "sqjax.json").unlink(),
        "expected a directory that sqjax.save wrote, got one without sqjax.json",
    ),
    "index of another save": (
        lambda d, s: (
            shards_of_a_save(d.with_name("other"), seed=1),
            (d / "sqjax.json").write_bytes((d.with_name("other") / "sqjax.json").read_bytes()),
        ),
        r"{0}: a: expected an array with the checksum",
    ),
}


@pytest.mark.parametrize("case", MIXED_UP)
def test_shards_that_do_not_belong_together(tmp_path, case):
    change, message = MIXED_UP[case]
    shards = shards_of_a_save(tmp_path / "w")
    change(tmp_path / "w", shards)
    message = message.format(*(path.name for path in shards))
    with pytest.raises(ValueError, match=f"load: .*w.*: {message}"):
        sq.load(tmp_path / "w")


def renamed(index, new):
    first = next(iter(index["shards"]))
    index["shards"] = {new if k == first else k: x for k, x in index["shards"].items()}


def first_shard(index):
    return next(iter(index["shards"].values()))


#: What a program could write that seals it.
FORGED = {
    "newer": (lambda i: i.update(sqjax=4), "expected layout version 3, got 4; update sqjax"),
    "another's": (lambda i: i.pop("tree"), "expected an index of sqjax.save"),
    "out of the directory": (lambda i: renamed(i, "../x"), r"expected names such as .*got '../x'"),
    "absolute": (lambda i: renamed(i, "/etc/passwd"), r"expected names such as .*'/etc/passwd'"),
    "another file": (lambda i: renamed(i, "config.json"), r"expected names such as"),
    "no shards": (lambda i: i.update(shards=[]), r"expected shards by name, got \[\]"),
    "no sums": (lambda i: renamed(i, "sqjax-00001-of-00077.safetensors"), "expected this shard"),
    "sums that are none": (
        lambda i: first_shard(i).update(tensors=3),
        "sqjax-00001-of-.*expected its sums",
    ),
    "an array too many": (
        lambda i: first_shard(i)["tensors"].update(c="0"),
        r"expected a shard, .*got one that holds \['a', 'b', 'w/tensor/values'\]",
    ),
    "a tree without it": (
        lambda i: i["tree"]["dict"].pop(0),
        "sqjax-00001-of-.*: a: a tensor that is not in the tree",
    ),
    "another graph": (lambda i: i.update(graph={"class": "Popen", "fields": []}), "class of sqjax"),
}


@pytest.mark.parametrize("case", FORGED)
def test_an_index_that_says_something_else(tmp_path, case):
    change, message = FORGED[case]
    shards_of_a_save(tmp_path / "w")
    file = tmp_path / "w/sqjax.json"
    index = json.loads(file.read_text())
    change(index)
    index["seal"] = seal_of(index)
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"load: .*w: .*{message}"):
        sq.load(tmp_path / "w")


def test_other_blanks_are_other_bytes(tmp_path):
    shards_of_a_save(tmp_path / "w")
    file = tmp_path / "w/sqjax.json"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(
        ValueError, match=r"sqjax.json: expected the bytes that were saved, got oth"
    ):
        sq.load(tmp_path / "w")


# Writes that fail ---------------------------------------------------------------------------------

NAMES = ["w8.safetensors", "w8"]


@posix
@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_says_so_and_leaves_nothing(tmp_path, name):
    """The system refuses to make a file larger than its limit, as it does on a full disk."""
    old = {"a": np.arange(4, dtype=np.float32)}
    sq.save(tmp_path / name, old)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(OSError, match=f"^.*save: .*{name}: .*File too large"):
            sq.save(tmp_path / name, {"a": np.zeros(10_000, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names_in(tmp_path) == [name]
    np.testing.assert_array_equal(sq.load(tmp_path / name)["a"], old["a"])


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="there is no /proc")
@pytest.mark.parametrize("name", NAMES)
def test_a_read_only_directory_says_so(tmp_path, name):
    """To root only a directory of the system's own is one."""
    folder = tmp_path
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):
        folder = Path("/proc")
    with pytest.raises(OSError, match=f"save: {folder}/{name}: "):
        sq.save(folder / name, {"a": np.zeros(2, np.float32)})
    tmp_path.chmod(0o755)
    assert names_in(tmp_path) == []


#: Reads lines; for each saves again and again in a process of its own, which it kills at random.
SAVING = """
import os, random, signal, sys, time, warnings
warnings.simplefilter("ignore")
import numpy as np
import sqjax as sq
path, seed = sys.argv[1], int(sys.argv[2])
draw = random.Random(seed)
def save(number):
    value = {name: np.full(3000, number, np.int32) for name in "abcd"}
    sq.save(path, value, max_shard_bytes=20_000)
save(1)
start = time.monotonic()
save(2)
takes = time.monotonic() - start
number = 2
for line in sys.stdin:
    number += 1000
    child = os.fork()
    if child == 0:
        while True:
            number += 1
            save(number)
    time.sleep(draw.uniform(0, 3 * takes))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("killed", flush=True)
"""


@posix
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_save_that_is_killed_leaves_the_old_or_the_new(tmp_path, name):
    path = tmp_path / name
    sq.save(path, {name: np.zeros(3000, np.int32) for name in "abcd"})
    code = [sys.executable, "-c", SAVING, str(path), "0"]
    with subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as saving:
        seen, left = [0], 0
        for _ in range(25):
            saving.stdin.write("\n")
            saving.stdin.flush()
            assert saving.stdout.readline() == "killed\n"
            found = sq.load(path)
            values = {int(x) for x in np.unique(np.stack(list(found.values())))}
            assert len(values) == 1  # all of one save
            assert max(values) >= seen[-1]
            seen.append(max(values))
            left += len(names_in(tmp_path)) > 1
        saving.stdin.close()
        assert saving.wait() == 0
    assert len(set(seen)) > 1  # some were saved
    assert left > 1  # and some were killed half-way
    # What was left there is removed, of a process that was killed before it had a lock after an hour.
    for early in tmp_path.glob(".sqjax_new-*"):
        os.utime(early, (0, 0))
    sq.save(path, {"a": np.zeros(2, np.int32)})
    assert names_in(tmp_path) == [name]


# Where arrays are placed --------------------------------------------------------------------------


def mesh():
    return jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])


@pytest.mark.parametrize("name", NAMES)
def test_leaves_are_placed_as_their_shardings_say(tmp_path, name):
    _, stats, qparams = calibrated()
    sq.save(tmp_path / name, qparams, stats=stats)
    of_float = {"norm": None, "w": NamedSharding(mesh(), P(None, "x"))}
    shardings = sq.shardings(qparams, of_float)
    expected = jax.device_put(qparams, shardings)
    for given in (shardings, lambda shapes: sq.shardings(shapes, of_float)):
        got = sq.load(tmp_path / name, shardings=given)
        assert_same(got, expected)
        blocks = got["w"].tensor.values.addressable_shards
        assert {x.data.shape for x in blocks} == {(3, 8)}
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    everywhere = NamedSharding(mesh(), P())
    saved = sq.load_saved(tmp_path / name, shardings=everywhere)
    assert {x.sharding for x in jax.tree.leaves(saved.params)} == {everywhere}
    assert_same(saved.stats, stats)


SHARDINGS = {
    "a spec": (lambda: {"a": P("x"), "b": None}, r"a: expected a Sharding or None, got P"),
    "missing": (lambda: {"a": None}, r"none for \['b'\]"),
    "too many": (
        lambda: dict.fromkeys("abc", NamedSharding(mesh(), P())),
        r"too many for \['c'\]",
    ),
    "does not divide": (lambda: NamedSharding(mesh(), P("x")), "b: .*the dimension size is 3"),
}


@pytest.mark.parametrize("case", SHARDINGS)
def test_shardings_that_do_not_fit(tmp_path, case):
    make, message = SHARDINGS[case]
    sq.save(tmp_path / "w", {"a": jnp.ones(2), "b": jnp.ones(3)})
    with pytest.raises(ValueError, match=f"load: .*w: shardings: .*{message}"):
        sq.load(tmp_path / "w", shardings=make())


def test_a_loaded_array_does_not_follow_its_file(tmp_path):
    """Arrays are copies: of what is mapped a change in the file would be seen."""
    file = tmp_path / "x.safetensors"
    sq.save(file, {"a": jnp.arange(5000.0)})
    got = sq.load(file)["a"]
    with file.open("rb+") as opened:
        opened.write(b"\1" * file.stat().st_size)
    np.testing.assert_array_equal(got, np.arange(5000.0))


PEAK = """
import resource, sys
import jax, numpy as np
import sqjax as sq
jax.block_until_ready(jax.numpy.ones(2))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tree = jax.block_until_ready(sq.load(sys.argv[1]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(1024 * (peak - before), sum(x.nbytes for x in jax.tree.leaves(tree)))
"""


@posix
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_loading_takes_the_tree_and_one_leaf(tmp_path, name):
    leaf = 8_000_000
    tree = {str(i): np.full(leaf // 4, i, np.float32) for i in range(12)}
    sq.save(tmp_path / name, tree, max_shard_bytes=3 * leaf)
    code = [sys.executable, "-c", PEAK, str(tmp_path / name)]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    peak, held = map(int, done.stdout.split())
    assert held == 12 * leaf
    # The leaf is there twice while it is copied: as it is mapped, and on its way to the device.
    assert peak < held + 2.5 * leaf
