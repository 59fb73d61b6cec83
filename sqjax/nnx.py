"""`sqjax.nnx`: NNX modules as functions, and quantized ones.

A face: the code is in `sqjax.layers.nnx` and `sqjax.layers.nnx_functional`.
"""

from sqjax.layers.nnx import QuantLinear as QuantLinear
from sqjax.layers.nnx import QuantModule as QuantModule
from sqjax.layers.nnx import rebuild as rebuild
from sqjax.layers.nnx_functional import Functional as Functional
from sqjax.layers.nnx_functional import QuantParam as QuantParam
from sqjax.layers.nnx_functional import functional as functional
