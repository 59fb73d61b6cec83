"""What the commands assume where the user says nothing; here, so that `--help` loads no model."""

#: The model that is loaded.
MODEL = "smollm2-135m"
#: The encoder of sentences that is loaded.
ENCODER = "all-minilm-l6-v2"
#: The smoothing strength.
ALPHA = 0.85
#: The tokens of a window of text.
LENGTH = 512
