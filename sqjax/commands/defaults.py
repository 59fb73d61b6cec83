"""What the commands assume where the user says nothing; apart, so that `--help` loads no model code."""

#: The model that is loaded.
MODEL = "smollm2-135m"
#: The smoothing strength.
ALPHA = 0.85
#: The tokens of a window of text.
LENGTH = 512
