"""How a decoder's parameters are split over the devices of a mesh, by the leaves' names."""

import re
from typing import Any

from jax.sharding import PartitionSpec

from sqjax._trees import map_named
from sqjax.weights.quant_weight import check_float

#: (a pattern of a leaf's path, which axis of one layer's leaf is split: None for none). What a
#: Dense layer before a nonlinearity computes is split by output, what follows it by input, so that
#: one sum over devices a layer is enough (Shoeybi et al. 2019, arXiv 1909.08053).
_SPLIT_AXES = (
    (r"embed_tokens/embedding$", -2),
    (r"(q_proj|k_proj|v_proj|q_b_proj|kv_b_proj)/(kernel|bias)$", -1),
    (r"(gate_proj|up_proj)/(kernel|bias)$", -1),
    (r"(o_proj|down_proj)/kernel$", -2),
    (r"lm_head/(kernel|bias)$", -1),
)


def partition_specs(params: Any, axis: str = "model") -> Any:
    """The PartitionSpec of every leaf of a `Model`'s float parameters, for tensor parallelism.

    Heads, the MLP's inner channels and the vocabulary are split over one axis of the mesh, and the
    rest is on every device. The number of devices must divide them, key/value heads too. For a
    quantized tree hand the result to `sqjax.shardings`.

    Args:
        params: the float tree, or `jax.eval_shape` of it; layers apart or in one stack.
        axis: the name of the mesh's axis.

    Raises:
        ValueError: the tree holds quantized leaves.

    Examples:
        >>> import jax
        >>> from sqjax.models import Model, llama_config, partition_specs
        >>> model = Model(llama_config(32, 8, 16, 1, 2, 2, 4))
        >>> specs = partition_specs(jax.eval_shape(model.init, jax.random.key(0)))
        >>> {name: x["kernel"] for name, x in specs["model"]["layers"]["0"]["mlp"].items()}
        ... # doctest: +NORMALIZE_WHITESPACE
        {'down_proj': P('model', None), 'gate_proj': P(None, 'model'),
         'up_proj': P(None, 'model')}
    """

    check_float(params, "partition_specs")

    def spec(path: str, leaf: Any) -> PartitionSpec:
        names: list[str | None] = [None] * leaf.ndim
        for pattern, split in _SPLIT_AXES:
            if re.search(pattern, path):
                names[split] = axis
                return PartitionSpec(*names)
        return PartitionSpec()

    return map_named(spec, params)
