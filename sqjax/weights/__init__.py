"""What a quantized leaf is: `QTensor`, `QuantWeight`, `Scheme`, and how one leaf is quantized and multiplied.

May import `numerics`; and the small helpers `sqjax._*`.
"""
