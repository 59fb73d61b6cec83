"""`Scheme`: how a site is quantized, and the presets."""

from typing import Literal, NamedTuple

from sqjax.numerics.formats import FORMATS, FormatName, Granularity
from sqjax.numerics.ranges import Range, is_range
from sqjax.numerics.weight_products import Activations


class Scheme(NamedTuple):
    """How the weight and the activation of a matmul are quantized.

    Attributes:
        activations: "per_token" (a scale a row, computed at run time), "per_tensor" (one scale, computed at run time),
            "static" (one scale, from calibration; what lies beyond is clipped, and NaN becomes 0), or None: they stay
            float, only the weight is narrow. "indices" is for embeddings that are no head, which meet indices: a scheme
            for those alone.
        weights: "per_channel" (a scale for every output), "per_tensor", or a group size: a scale for so many
            consecutive channels of an output.
        smoothing: alpha of smoothing at run time, or None: the weight becomes s W, and the activation's quantizer
            divides by s. For sites whose scale no leaf can absorb; elsewhere `smooth` gives the same for nothing.
        weight_format: "int8", "int4", "e4m3" or "e5m2"; symmetric, in [-bound, bound].
        activation_format: "int8", or "e4m3" or "e5m2" with weights in float8.
        zero_point: whether int4 weights have a zero point.
        two_level: whether int4 groups have integer scales below one float scale for every output, so that they expand
            to int8 in integers (QServe, Lin et al. 2024, arXiv 2405.04532); zero points are part of that.
        outliers: a threshold, or None: channels whose activations exceeded it in calibration are multiplied in float
            (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339).
        range: what a static scale covers: "absmax"; "mse", the range of least expected squared error; or a percentile
            as a fraction, such as 0.9999. What is larger is clipped. The last two need
            `calibrate(..., histogram=True)`.

    Example:
        >>> import sqjax as sq
        >>> sq.W8A8_O3._replace(weights="per_tensor").activations
        'static'
    """

    activations: Activations | Literal["indices"] | None = "per_token"
    weights: Granularity = "per_channel"
    smoothing: float | None = None
    weight_format: FormatName = "int8"
    activation_format: FormatName = "int8"
    zero_point: bool = False
    two_level: bool = False
    outliers: float | None = None
    range: Range = "absmax"

    @property
    def measured(self) -> bool:
        """Whether it needs to know the ranges of the activations that `calibrate` saw."""
        return (
            self.activations == "static" or self.smoothing is not None or self.outliers is not None
        )

    def check(self, where: str) -> None:
        """Raises ValueError, naming `where`, if the parts do not go together."""
        if problem := self._problem():
            raise ValueError(f"{where}: {self}: {problem}")

    def _problem(self) -> str | None:
        if (
            unknown := {self.weight_format, self.activation_format}.difference(FORMATS)
        ) or self.activations not in (
            *("per_token", "per_tensor", "static", "indices"),
            None,
        ):
            return f"expected formats among {', '.join(FORMATS)} and known activations, got {unknown or ''}"
        if isinstance(self.weights, str) and self.weights not in ("per_channel", "per_tensor"):
            return f"expected weights per_channel, per_tensor or a group size, got {self.weights!r}"
        if not isinstance(self.weights, str) and (
            isinstance(self.weights, bool) or self.weights < 1
        ):
            return f"expected a group size of 1 or more, got {self.weights}"
        weight, activation = FORMATS[self.weight_format], FORMATS[self.activation_format]
        quantized = self.activations not in ("indices", None)
        if quantized and (
            weight.floating != activation.floating or self.activation_format == "int4"
        ):
            return "int8 activations go with int8 or int4 weights, float8 ones with float8 weights"
        if (self.zero_point or self.two_level) and self.weight_format != "int4":
            return "zero points and two levels are for int4 weights"
        if self.two_level and (isinstance(self.weights, str) or not quantized):
            return "two levels need a group size and int8 activations; without these leave two_level out"
        if self.outliers is not None and (not quantized or self.outliers <= 0):
            return "outliers need a positive threshold and quantized activations"
        if self.smoothing is not None and self.activations == "indices":
            return "embeddings that are looked up have no activation to smooth"
        if not is_range(self.range):
            return "expected a range 'absmax', 'mse', or a percentile as a fraction in (0.0, 1.0], such as 0.9999"
        if self.range != "absmax" and self.activations != "static":
            return "a range is for static activations: the scales of others are computed from the absmax at run time"
        if self.range != "absmax" and (self.smoothing is not None or self.outliers is not None):
            return (
                "a range comes from the histogram of X, not of X / s or of X without outliers; use range='absmax' with "
                "smoothing at run time and with outliers, or smooth the parameters"
            )
        return None


#: W8A8 at the paper's efficiency level O1: per-token dynamic activations (the most accurate).
W8A8_O1 = Scheme("per_token")
#: O2: per-tensor dynamic activations.
W8A8_O2 = Scheme("per_tensor")
#: O3: per-tensor static activations (the fastest; smoothing matters most here).
W8A8_O3 = Scheme("static")
W8A8 = W8A8_O1
#: W8A8 in which channels with |x| > 6 in calibration stay float: LLM.int8(), composes with smoothing.
W8A8_OUTLIERS = Scheme("per_token", outliers=6.0)
#: float8 weights and per-token activations.
FP8 = Scheme("per_token", weight_format="e4m3", activation_format="e4m3")
FP8_E5M2 = Scheme("per_token", weight_format="e5m2", activation_format="e5m2")
#: int8 weights, float activations.
W8A16 = Scheme(None)
#: int4 weights in groups with a zero point, float activations.
W4A16 = Scheme(None, 128, weight_format="int4", zero_point=True)
W4A16_G64 = W4A16._replace(weights=64)
#: int4 weights that expand to int8 in integers, int8 per-token activations.
W4A8 = Scheme("per_token", 128, weight_format="int4", zero_point=True, two_level=True)
#: An int8 embedding table, a scale a row; and an int4 one in groups.
EMBEDDING_INT8 = Scheme("indices")
EMBEDDING_INT4 = Scheme("indices", 64, weight_format="int4", zero_point=True)
