"""What the commands assume where the user says nothing; here, so that `--help` loads no model."""

#: The model that is loaded.
MODEL = "smollm2-135m"
#: The encoder of sentences that is loaded.
ENCODER = "all-minilm-l6-v2"
#: The smoothing strength.
ALPHA = 0.85
#: The tokens of a window of text.
LENGTH = 512
#: {what is done with a text: how many windows of it are read}.
WINDOWS = {"calibration": 16, "evaluation": 24}
#: {the name of a preset, in small letters: whether it quantizes activations}.
SCHEMES = {
    "w8a8": True,
    "w8a8_o1": True,
    "w8a8_o2": True,
    "w8a8_o3": True,
    "w8a8_o3_rotated": True,
    "w8a8_outliers": True,
    "fp8": True,
    "fp8_e5m2": True,
    "w8a16": False,
    "w4a16": False,
    "w4a16_g64": False,
    "w4a8": True,
    "w4a4": True,
    "w4a4_rotated": True,
    "embedding_int8": False,
    "embedding_int4": False,
}
#: The types of weights in a GGUF file.
GGUF_SCHEMES = ("q8_0", "q4_0", "q4_1")
