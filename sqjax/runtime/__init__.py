"""Running a program on quantized leaves: `quantized`, the rules for weights and caches, int8 attention.

May import `program`, `weights` and `numerics`; and the small helpers `sqjax._*`.
"""
