"""Compiles functions for NVIDIA GPUs that are not there, and reads the optimized program.

The CUDA plug-in holds the compiler; no GPU, driver or CUDA toolkit is needed. The files in `gpu/` describe the targets:
hardware figures after the public specs in openxla/xla (Apache-2.0). Nothing runs, nothing is autotuned: block sizes
mean nothing, only what is computed and what is written to memory does.
"""

import contextlib
import importlib.util
import math
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AbstractMesh, SingleDeviceSharding

TARGETS = {"sm_80": "a100_sxm_80", "sm_90a": "h100_sxm"}
#: How matmuls are compiled: by XLA's own generator of Triton kernels, or as calls of cuBLASLt.
FORMS = ("triton", "cublas")


def plugin_is_there() -> bool:
    """Whether the CUDA plug-in (12 or 13) is installed; jax must not need to load for that."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13))


@cache
def device(target: str) -> Any:
    """A device of the target that can be compiled for."""
    text = (Path(__file__).parent / "gpu" / f"{TARGETS[target]}.txtpb").read_text()
    options = {"target_config": text, "topology": "1x1x1"}
    return topologies.get_topology_desc(platform="cuda", topology_name="", **options).devices[0]


class Value(NamedTuple):
    """The dtype (as XLA writes it: s8, bf16, f8e4m3fn) and shape of an array."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Program(NamedTuple):
    """An optimized program: its text, the PTX of its kernels, the bytes of its temporaries."""

    text: str
    ptx: str
    temporary: int

    def matmuls(self) -> list[tuple[str, str, str]]:
        """The dtypes (lhs, rhs, result) of every matrix product, as the units multiply them."""
        found = []
        for lines in computations(self.text).values():
            values = {line.name: line.values for line in lines}
            for line in lines:
                if line.opcode == "dot" or "__cublas$lt$matmul" in line.text:
                    lhs, rhs = (values[operand][0].dtype for operand in line.operands[:2])
                    found.append((lhs, rhs, line.values[0].dtype))
        return found

    def written(self) -> list[Value]:
        """Every array that a kernel or a call writes to memory; cuBLASLt's workspace is not one."""
        inner = set(re.findall(r"(?:calls|to_apply)=%([\w.\-]+)", self.text))
        outer = [
            line
            for name, lines in computations(self.text).items()
            if name not in inner
            for line in lines
        ]
        return [
            value
            for line in outer
            if line.opcode not in _FREE
            for value in line.values
            if value != _WORKSPACE
        ]

    def copies(self, size: int, rows: int) -> list[Value]:
        """What it writes that is as large as a weight of `size` elements and has no axis of the activation's rows."""
        return [value for value in self.written() if value.size >= size and rows not in value.shape]


_FREE = ("parameter", "bitcast", "get-tuple-element", "tuple", "constant")
_WORKSPACE = Value("s8", (4194304,))


class Line(NamedTuple):
    """An instruction: %name = values opcode(operands), ..."""

    name: str
    values: list[Value]
    opcode: str
    operands: list[str]
    text: str


def computations(text: str) -> dict[str, list[Line]]:
    """{name: its instructions} of a program's text."""
    found: dict[str, list[Line]] = {}
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%([\w.\-]+) \(.*\{$", line):
            lines = found.setdefault(header[1], [])
        elif parsed := re.match(
            r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)", line
        ):
            name, types, opcode, operands = parsed.groups()
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", types)
            values = [
                Value(dtype, tuple(map(int, filter(None, shape.split(",")))))
                for dtype, shape in arrays
            ]
            lines.append(Line(name, values, opcode, re.findall(r"%([\w.\-]+)", operands), line))
    return found


@contextlib.contextmanager
def _without_cache():
    """The cache of compiled programs left alone, because reading one takes a device of its kind."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # which asks again whether it is enabled
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


def compiled(
    fn: Any, *args: Any, target: str, form: str = "triton", ptx: bool = False, merge: bool = False
) -> Program:
    """`fn(*args)` compiled for a target; arrays may be `jax.ShapeDtypeStruct`s.

    `merge` is XLA's default: matmuls of one activation become one matmul on their concatenated weights.
    """
    sharding = SingleDeviceSharding(device(target))
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    with _kernels_for(device(target)):
        lowered = jax.jit(fn).trace(*specs).lower(lowering_platforms=("cuda",))
    options: dict[str, Any] = {"xla_gpu_enable_triton_gemm": form == "triton"}
    options |= {} if merge else {"xla_gpu_dot_merger_threshold_mb": 0}
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"} if ptx else {}
        with _without_cache():
            done = lowered.compile(compiler_options=options | dump)
        kernels = "".join(path.read_text() for path in Path(folder).glob("*.ptx"))
    return Program(done.as_text(), kernels, done.memory_analysis().temp_size_in_bytes)


def _kernels_for(target: Any) -> Any:
    """jax 0.12 asks the ambient mesh which GPU a Pallas kernel is for; earlier jaxes do not ask."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    kind = jax.sharding.AbstractDevice(
        device_kind=target.device_kind, num_cores=target.core_count, platform="gpu"
    )
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), axis_types=(), abstract_device=kind))
