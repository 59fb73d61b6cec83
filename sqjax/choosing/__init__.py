"""How scales, roundings and precisions are chosen from data: searches, AWQ, GPTQ, learning.

May import `calibration`, `folding`, `methods`, `weights`, `runtime`, `program` and `numerics`; and
the small helpers `sqjax._*`.
"""
