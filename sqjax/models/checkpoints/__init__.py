"""Reading checkpoints: GGUF and Hugging Face files, mapped onto the model's names.

May import what `models` may; and the small helpers `sqjax._*`.
"""
