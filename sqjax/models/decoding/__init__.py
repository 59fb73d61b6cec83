"""Generating tokens: prompts, sampling, the loop.

May import what `models` may; and the small helpers `sqjax._*`.
"""
