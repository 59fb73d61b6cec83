"""Decoders and encoders of texts that read real checkpoints of many families, and what runs them.

    model, params = sqjax.models.load("smollm2-135m")
    logits = model.apply(params, ids)  # (batch, tokens, vocab)
    prompt = "The capital of France is"
    answer = sqjax.models.generate(model, params, prompt, 32, cache="int8").texts[0]

    encoder, params = sqjax.models.load_encoder("all-minilm-l6-v2")
    vectors = encoder.encode(params, ["A cat.", "A dog."])  # (2, 384)

    fn, params = sqjax.models.from_flax(hugging_face_flax_model)  # any of its classes

`model.apply` and `encoder.apply` are ordinary pure functions of (params, ids): hand them to
`sqjax.calibrate` as they are.

May import `weights`, `runtime`, `layers`, `numerics`, `files`, and the small helpers `sqjax._*`;
never `folding`, `calibration` or `methods`: a model is quantized like any other function.
"""

from sqjax.layers.hf_flax import from_flax as from_flax
from sqjax.models.checkpoints.encoders import load_encoder as load_encoder
from sqjax.models.checkpoints.family import Family as Family
from sqjax.models.checkpoints.images import load_image_text as load_image_text
from sqjax.models.checkpoints.images import load_vision as load_vision
from sqjax.models.checkpoints.loading import load as load
from sqjax.models.checkpoints.loading import load_model as load_model
from sqjax.models.checkpoints.writing.gguf_saving import save_gguf as save_gguf
from sqjax.models.checkpoints.writing.programs import export as export
from sqjax.models.checkpoints.writing.saving import (
    save_compressed_tensors as save_compressed_tensors,
)
from sqjax.models.checkpoints.writing.saving import (
    save_huggingface as save_huggingface,
)
from sqjax.models.checkpoints.writing.whole import save as save
from sqjax.models.config import DecoderConfig as DecoderConfig
from sqjax.models.config import llama_config as llama_config
from sqjax.models.decoding.cache_scales import CacheScales as CacheScales
from sqjax.models.decoding.cache_scales import cache_scales as cache_scales
from sqjax.models.decoding.generation import Generated as Generated
from sqjax.models.decoding.generation import generate as generate
from sqjax.models.decoding.generation import greedy as greedy
from sqjax.models.decoding.prefix_files import load_prefix as load_prefix
from sqjax.models.decoding.prefix_files import save_prefix as save_prefix
from sqjax.models.decoding.prefixes import Prefix as Prefix
from sqjax.models.decoding.prefixes import prefix as prefix
from sqjax.models.decoding.prefixes import token_peaks as token_peaks
from sqjax.models.encoder import Encoder as Encoder
from sqjax.models.encoder_config import EncoderConfig as EncoderConfig
from sqjax.models.evaluation.harness import harness_model as harness_model
from sqjax.models.evaluation.perplexity import perplexity as perplexity
from sqjax.models.evaluation.scoring import Question as Question
from sqjax.models.evaluation.scoring import loglikelihoods as loglikelihoods
from sqjax.models.evaluation.scoring import multiple_choice as multiple_choice
from sqjax.models.fusing import fuse as fuse
from sqjax.models.image_text import ImageText as ImageText
from sqjax.models.image_text import TextTowerModel as TextTowerModel
from sqjax.models.model import Model as Model
from sqjax.models.pooling import Pooling as Pooling
from sqjax.models.sharding import partition_specs as partition_specs
from sqjax.models.slots import CacheFormat as CacheFormat
from sqjax.models.stacking import stack_layers as stack_layers
from sqjax.models.stacking import unstack_layers as unstack_layers
from sqjax.models.text_tower import TextTowerConfig as TextTowerConfig
from sqjax.models.untying import untie as untie
from sqjax.models.vision_config import VisionConfig as VisionConfig
from sqjax.models.vision_model import Preprocessing as Preprocessing
from sqjax.models.vision_model import VisionModel as VisionModel

#: The name of `llama_config` when it was a class.
LlamaConfig = llama_config
