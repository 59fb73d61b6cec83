"""Quantized layers of Flax linen and NNX, and Hugging Face's Flax classes as functions.

May import `weights`, `runtime`, `program` and `numerics`; and the small helpers `sqjax._*`.
"""
