"""Checkpoints: GGUF and Hugging Face files, mapped onto the model's names; and written for others.

May import what `models` may; and the small helpers `sqjax._*`.
"""
