"""The machine that figures come from, and the commit of the code that gave them."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax

from sqjax import __version__

#: The units of a processor that decide how fast int8 and bfloat16 matmuls are, as Linux names them.
FEATURES = ("avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16")

#: Packages whose versions may change what is computed.
_PACKAGES = ("jax", "jaxlib", "flax", "numpy")

CPUINFO = Path("/proc/cpuinfo")
ROOT = Path(__file__).parents[2]


class Machine(NamedTuple):
    """The machine that figures come from.

    Attributes:
        cpu: the processor's name, with family and model numbers because cloud machines often
            give no more than "AMD EPYC" as the name.
        features: those of `FEATURES` that it has; empty where the system does not list them.
        cores: how many cores this process may use.
    """

    cpu: str
    features: list[str]
    cores: int

    def __str__(self) -> str:
        units = f" ({', '.join(self.features)})" if self.features else ""
        cores = "1 core" if self.cores == 1 else f"{self.cores} cores"
        return f"{cores} of {self.cpu}{units}"


def this_machine() -> Machine:
    """The machine that runs this process."""
    cpu = platform.processor() or platform.machine()
    features: list[str] = []
    if CPUINFO.exists():
        fields = _cpuinfo_fields(CPUINFO.read_text())
        cpu = fields.get("model name", cpu)
        for key in ("cpu family", "model"):
            if key in fields:
                cpu += f", {key} {fields[key]}"
        flags = fields.get("flags", "").split()
        features = [name for name in FEATURES if name in flags]
    return Machine(cpu, features, usable_cores())


def _cpuinfo_fields(text: str) -> dict[str, str]:
    """{field: value} of /proc/cpuinfo, whose lines are "model name : AMD EPYC"; the last core's."""
    fields = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields[key.strip()] = value.strip()
    return fields


def usable_cores() -> int:
    """The cores that this process may use, which in a container can be fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def current_commit(root: Path = ROOT) -> str | None:
    """The git hash of the checkout at `root`, as in `Record.commit`."""
    head = _git(root, "rev-parse", "HEAD", "--show-prefix")
    if head is None:
        return None
    commit, *prefix = head.split()
    if prefix:
        # `root` is a folder inside another repository, for example an environment's
        # site-packages: that repository's commit says nothing about this code.
        return None
    changed = _git(root, "status", "--porcelain", "--", "sqjax")
    return f"{commit}-dirty" if changed else commit


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints, or None if there is no git or it refuses."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """The versions of what computes, and the platform that it computes on."""
    found = {"sqjax": __version__}
    for package in _PACKAGES:
        found[package] = metadata.version(package)
    found["python"] = platform.python_version()
    found["platform"] = jax.default_backend()
    return found
