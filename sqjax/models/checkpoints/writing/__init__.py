"""Models written for others to read: as Hugging Face has them, as GGUF, and as programs of jax.

What reading knows serves here too: the families' tables of names, and layouts, in both directions.
"""
