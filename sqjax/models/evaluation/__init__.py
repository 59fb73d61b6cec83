"""Judging a model: perplexity, likelihoods of choices, lm-evaluation-harness.

May import what `models` may; and the small helpers `sqjax._*`.
"""
