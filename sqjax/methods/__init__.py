"""Ways to choose what is folded and quantized: `smooth`, `quantize`, `smoothquant`, `verify`.

May import `calibration`, `folding`, `weights`, `runtime`, `program` and `numerics`; and the small
helpers `sqjax._*`.
"""
