"""How many bytes a tree takes, quantized or not."""

from typing import Any

import jax

from sqjax.weights.qtensor import QTensor
from sqjax.weights.quant_weight import QuantWeight


def weight_bytes(tree: Any) -> int:
    """Bytes of a tree as a file or a GPU holds them, where int4 takes half a byte."""

    def is_quantized_leaf(leaf: Any) -> bool:
        return isinstance(leaf, QuantWeight | QTensor)

    total = 0
    for leaf in jax.tree.leaves(tree, is_leaf=is_quantized_leaf):
        if isinstance(leaf, QuantWeight):
            beside = (leaf.input_scale, leaf.smoothing, leaf.outliers)
            total += leaf.tensor.nbytes
            total += sum(array.nbytes for array in jax.tree.leaves(beside))
        else:
            total += int(leaf.nbytes)
    return total
