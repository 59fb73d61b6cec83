"""Our paths of the parts of a layer, for tables of names; and rows of several Dense layers."""

from collections.abc import Mapping

from sqjax.models.checkpoints.names import Row, dense
from sqjax.models.config import LayerKind

OUR_LAYER = "model/layers/{layer}"
QKV = [f"{OUR_LAYER}/self_attn/{part}_proj" for part in "qkv"]
O_PROJ = f"{OUR_LAYER}/self_attn/o_proj"
UP_PROJ, DOWN_PROJ = f"{OUR_LAYER}/mlp/up_proj", f"{OUR_LAYER}/mlp/down_proj"
GATE_UP = [f"{OUR_LAYER}/mlp/gate_proj", UP_PROJ]
FIRST_NORM = f"{OUR_LAYER}/input_layernorm"
SECOND_NORM = f"{OUR_LAYER}/post_attention_layernorm"
OUTPUT_NORM = f"{OUR_LAYER}/post_feedforward_layernorm"

#: Layers of models that know positions from a table, or from ALiBi.
NO_ROPE = (LayerKind(None, None),)


def denses(layer: str, names: Mapping[str, str]) -> tuple[Row, ...]:
    """The rows of a layer's Dense layers, {their name in the layer: our path}."""
    rows: list[Row] = []
    for theirs, ours in names.items():
        rows += dense(f"{layer}.{theirs}", ours)
    return tuple(rows)
