"""What a description of a family of models is made of, for families that are not known here.

    from sqjax.models import families as f

    FAMILY = f.Family(
        "my_model",
        fields={**f.LLAMA_FIELDS, "attention_bias": True},
        rows=(*f.OUTER_ROWS, *f.several("layers.{layer}.qkv", f.QKV), ...),
    )
    model, params = sqjax.models.load(directory, families=[FAMILY])

`FAMILIES` holds those that are known, {model_type: Family}: take what you can of the nearest.
"""

from sqjax.models.checkpoints.families.common import activation as activation
from sqjax.models.checkpoints.families.common import head_dim as head_dim
from sqjax.models.checkpoints.families.common import layer_norm as layer_norm
from sqjax.models.checkpoints.families.common import rms_norm as rms_norm
from sqjax.models.checkpoints.families.common import rope as rope
from sqjax.models.checkpoints.families.encoders import (
    BERT_FIELDS as BERT_FIELDS,
)
from sqjax.models.checkpoints.families.encoders import BERT_ROWS as BERT_ROWS
from sqjax.models.checkpoints.families.known import FAMILIES as FAMILIES
from sqjax.models.checkpoints.families.llama import (
    ATTENTION_ROWS as ATTENTION_ROWS,
)
from sqjax.models.checkpoints.families.llama import LLAMA_FIELDS as LLAMA_FIELDS
from sqjax.models.checkpoints.families.llama import LLAMA_ROWS as LLAMA_ROWS
from sqjax.models.checkpoints.families.llama import MLP_ROWS as MLP_ROWS
from sqjax.models.checkpoints.families.llama import OUTER_ROWS as OUTER_ROWS
from sqjax.models.checkpoints.families.paths import GATE_UP as GATE_UP
from sqjax.models.checkpoints.families.paths import OUR_LAYER as OUR_LAYER
from sqjax.models.checkpoints.families.paths import QKV as QKV
from sqjax.models.checkpoints.families.paths import denses as denses
from sqjax.models.checkpoints.families.vision import PATCHES as PATCHES
from sqjax.models.checkpoints.families.vision import (
    WITH_BATCH_AXIS as WITH_BATCH_AXIS,
)
from sqjax.models.checkpoints.family import Family as Family
from sqjax.models.checkpoints.names import BY_KEY_HEAD as BY_KEY_HEAD
from sqjax.models.checkpoints.names import (
    ONE_AFTER_ANOTHER as ONE_AFTER_ANOTHER,
)
from sqjax.models.checkpoints.names import TRANSPOSED as TRANSPOSED
from sqjax.models.checkpoints.names import Layout as Layout
from sqjax.models.checkpoints.names import conv1d as conv1d
from sqjax.models.checkpoints.names import dense as dense
from sqjax.models.checkpoints.names import norm as norm
from sqjax.models.checkpoints.names import several as several
from sqjax.models.checkpoints.names import tensor as tensor
from sqjax.models.checkpoints.settings import Settings as Settings
from sqjax.models.checkpoints.settings import read as read
from sqjax.models.config import Experts as Experts
from sqjax.models.config import LatentAttention as LatentAttention
from sqjax.models.config import LayerKind as LayerKind
from sqjax.models.config import Norm as Norm
from sqjax.models.fields import EPSILON as EPSILON
from sqjax.models.fields import FLAG as FLAG
from sqjax.models.fields import POSITIVE as POSITIVE
from sqjax.models.fields import SIZE as SIZE
from sqjax.models.rope import Rope as Rope
from sqjax.models.vision_config import VisionConfig as VisionConfig
