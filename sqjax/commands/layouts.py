"""The tables by name: what each looks like is said in the two files that are imported here.

The commands print these tables when they end, and `python -m sqjax.commands.tables` puts the same
ones into Markdown. A `Table` has two forms, `text` and `markdown` (`sqjax.commands.cells`).
"""

from collections.abc import Callable, Sequence

from sqjax.commands import layouts_of_quality as quality
from sqjax.commands import layouts_of_speed as speed
from sqjax.commands.cells import Table
from sqjax.commands.records import Row

#: The tables by the names that marks in Markdown give them.
LAYOUTS: dict[str, Callable[[Sequence[Row]], Table]] = {
    "memory": speed.memory,
    "demo": quality.demo,
    "schemes": quality.schemes,
    "embeddings": quality.embeddings,
    "benchmark": speed.models,
    "benchmark rows": speed.matvecs,
    "benchmark matmul": speed.matmuls,
    "decode caches": quality.caches,
    "decode steps": speed.steps,
    "gpu matmuls": speed.gpu_matmuls,
    "gpu model": speed.gpu_model,
    "gpu kernels": speed.gpu_kernels,
    "gpu visit": speed.gpu_visit,
    "convolutional models": quality.convolutional_models,
    "convolution speeds": speed.convolution_speeds,
    "peers": quality.peers,
    "choices": quality.choices,
    "int4 encoder": quality.int4_encoder,
    "exactness": quality.exactness,
    "rotation costs": speed.rotation_costs,
    "rotation finding": speed.rotation_finding,
    "rotation gains": quality.rotation_gains,
}
