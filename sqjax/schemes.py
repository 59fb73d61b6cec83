"""`Scheme`: how a site is quantized, and the presets."""

from typing import NamedTuple

from sqjax.formats import Granularity
from sqjax.matmul import Activations
from sqjax.ranges import Range


class Scheme(NamedTuple):
    """How the weight and the activation of a matmul are quantized; both symmetric int8.

    Attributes:
        activations: "per_token" (a scale a row, computed at run time), "per_tensor" (one scale, computed at run time)
            or "static" (one scale, from calibration).
        weights: "per_channel" (a scale for every output) or "per_tensor".
        smoothing: alpha of smoothing at run time, or None: the weight becomes s W, and the activation's quantizer
            divides by s. For sites whose scale no leaf can absorb; elsewhere `smooth` gives the same for nothing.
        range: what a static scale covers: "absmax"; "mse", the range of least expected squared error; or a percentile
            as a fraction, such as 0.9999. What is larger is clipped. The last two need
            `calibrate(..., histogram=True)`, and no smoothing at run time.

    Example:
        >>> import sqjax as sq
        >>> sq.W8A8_O3._replace(weights="per_tensor")
        Scheme(activations='static', weights='per_tensor', smoothing=None, range='absmax')
    """

    activations: Activations = "per_token"
    weights: Granularity = "per_channel"
    smoothing: float | None = None
    range: Range = "absmax"


#: W8A8 at the paper's efficiency level O1: per-token dynamic activations (the most accurate).
W8A8_O1 = Scheme("per_token")
#: O2: per-tensor dynamic activations.
W8A8_O2 = Scheme("per_tensor")
#: O3: per-tensor static activations (the fastest; smoothing matters most here).
W8A8_O3 = Scheme("static")
W8A8 = W8A8_O1
