"""What a quantized leaf is, and how one leaf is quantized and multiplied.

`QTensor` and `QuantWeight` are the leaves, `Scheme` says how they are made.

May import `numerics`; and the small helpers `sqjax._*`.
"""
