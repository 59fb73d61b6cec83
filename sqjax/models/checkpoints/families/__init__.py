"""Families of models, as data: how each one's config.json and tensor names are to be read.

May import its siblings in `checkpoints` and what `models` may; a family is a value, no class.
"""
