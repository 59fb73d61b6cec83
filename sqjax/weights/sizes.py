"""How many bytes a tree takes, quantized or not."""

import math
from typing import Any

import jax

from sqjax.weights.quant_weight import QuantWeight, is_quantized_leaf


def weight_bytes(tree: Any) -> int:
    """Bytes of a tree as a file or a GPU holds them, where int4 takes half a byte."""
    total = 0
    for leaf in jax.tree.leaves(tree, is_leaf=is_quantized_leaf):
        if isinstance(leaf, QuantWeight):
            beside = (leaf.input_scale, leaf.smoothing, leaf.outliers)
            total += leaf.tensor.nbytes
            total += sum(array.nbytes for array in jax.tree.leaves(beside))
        else:
            total += int(leaf.nbytes)
    return total


def shown_bytes(size: int) -> str:
    """Bytes as a text of three digits: "538 MB", "96 B"."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(int(math.log10(max(size, 1)) // 3), len(units) - 1)
    return f"{size / 1000**power:.3g} {units[power]}"
