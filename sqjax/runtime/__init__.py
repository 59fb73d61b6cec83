"""Running a program on quantized values: `quantized`, its rules, and int8 attention.

`quantized` traces a function and runs its program (`sqjax.program.walk`) with quantized weights and
caches in place of float arrays. `kinds` says what these are, `weight_rules` and `cache_rules` what
each primitive does to them.

May import `program`, `weights` and `numerics`; and the small helpers `sqjax._*`.
"""
