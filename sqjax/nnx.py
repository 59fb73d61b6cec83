"""`sqjax.nnx`: NNX modules as functions, and quantized ones.

A face: the code is in `sqjax.layers.nnx`, `nnx_conv` and `nnx_functional` beside it.
"""

from sqjax.layers.nnx import QuantLinear as QuantLinear
from sqjax.layers.nnx import QuantModule as QuantModule
from sqjax.layers.nnx import rebuild as rebuild
from sqjax.layers.nnx_conv import QuantConv as QuantConv
from sqjax.layers.nnx_functional import Functional as Functional
from sqjax.layers.nnx_functional import QuantParam as QuantParam
from sqjax.layers.nnx_functional import functional as functional
