"""Text to token ids and back: the tokenizers that checkpoints hold, and their chat templates.

May import what `models` may; and the small helpers `sqjax._*`.
"""
