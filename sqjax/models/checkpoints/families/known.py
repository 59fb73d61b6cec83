"""The table of all families that `load`, `load_encoder` and `load_vision` know."""

from collections.abc import Mapping

from sqjax.models.checkpoints.families import (
    bloom,
    encoders,
    experts,
    gemma,
    gpt,
    llama,
    vision,
)
from sqjax.models.checkpoints.family import Family

_ALL = (
    llama.LLAMA,
    llama.SMOLLM3,
    llama.MISTRAL,
    llama.MINISTRAL,
    llama.QWEN2,
    llama.QWEN3,
    llama.GRANITE,
    llama.OLMO2,
    llama.PHI3,
    llama.GLM,
    llama.GLM4,
    llama.STABLELM,
    llama.COHERE,
    llama.COHERE2,
    experts.MIXTRAL,
    experts.QWEN2_MOE,
    experts.QWEN3_MOE,
    experts.OLMOE,
    experts.DEEPSEEK_V2,
    gemma.GEMMA,
    gemma.GEMMA2,
    gemma.GEMMA3_TEXT,
    gpt.GPT2,
    gpt.GPTJ,
    gpt.GPT_NEOX,
    bloom.OPT,
    bloom.BLOOM,
    bloom.FALCON,
    gpt.PHI,
    encoders.BERT,
    encoders.ROBERTA,
    encoders.XLM_ROBERTA,
    encoders.CAMEMBERT,
    encoders.MPNET,
    encoders.DISTILBERT,
    encoders.MODERNBERT,
    vision.VIT,
    vision.DINOV2,
    vision.CLIP,
    vision.CLIP_VISION,
    vision.SIGLIP,
    vision.SIGLIP_VISION,
)
#: {model_type of config.json: family}.
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _ALL}
