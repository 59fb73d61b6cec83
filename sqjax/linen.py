"""`sqjax.linen`: quantized Flax linen modules. A face: the code is in
`sqjax.layers.linen` and `sqjax.layers.linen_conv`.
"""

from sqjax.layers.linen import QuantDense as QuantDense
from sqjax.layers.linen import QuantDenseGeneral as QuantDenseGeneral
from sqjax.layers.linen import quantize_dense as quantize_dense
from sqjax.layers.linen import quantize_dense_general as quantize_dense_general
from sqjax.layers.linen_conv import QuantConv as QuantConv
from sqjax.layers.linen_conv import quantize_conv as quantize_conv
