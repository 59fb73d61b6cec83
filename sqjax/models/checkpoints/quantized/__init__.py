"""Hugging Face checkpoints whose weights are quantized already, one file for each layout.

May import what `models` may; and the small helpers `sqjax._*`.
"""
