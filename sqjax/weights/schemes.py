"""`Scheme`: how a site is quantized, the small classes that it is made of, and the presets."""

import dataclasses
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypeVar

from sqjax.numerics.formats import FORMATS, INT4, INT8, Format, Granularity
from sqjax.numerics.ranges import Range, is_range

#: The formats of activations: an int4 activation is too coarse, so no product takes one.
ActivationFormat = Literal["int8", "e4m3", "e5m2"]
Float8Format = Literal["e4m3", "e5m2"]

Part = TypeVar("Part", bound="_Part")


@dataclass(frozen=True, kw_only=True, repr=False)
class _Part:
    """What `Scheme` and its parts share: `replace`, and a repr that calls the constructor."""

    def __repr__(self) -> str:
        arguments = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"{type(self).__name__}({', '.join(arguments)})"

    def replace(self: Part, **changes: Any) -> Part:
        """A copy with some fields changed. It is checked as any new one is."""
        return dataclasses.replace(self, **changes)


def _refusal(part: Any, field: str, expected: str) -> ValueError:
    """The error that names the field of `part`, what was expected there, and what came."""
    came = getattr(part, field)
    return ValueError(
        f"{type(part).__name__}.{field}: expected {expected}, got {came!r}"
    )


def _is_number(x: Any) -> bool:
    """Whether x is a real number. A bool counts as one in Python, but no field here means it."""
    return isinstance(x, Real) and not isinstance(x, bool)


# Weights ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, repr=False)
class _Weight(_Part):
    """The fields that every weight has: which of its elements share a scale."""

    group_size: int | None = None
    per_tensor: bool = False

    def __post_init__(self) -> None:
        size = self.group_size
        if size is not None and (type(size) is not int or size < 1):
            meaning = "an int of 1 or more (channels in a group), or None (one scale for an output)"
            raise _refusal(self, "group_size", meaning)
        if not isinstance(self.per_tensor, bool):
            raise _refusal(self, "per_tensor", "True or False")
        if self.per_tensor and size is not None:
            meaning = "None with per_tensor=True (a tensor has one scale, or one for each group)"
            raise _refusal(self, "group_size", meaning)

    @property
    def granularity(self) -> Granularity:
        """ "per_tensor", the group size, or "per_channel" (a scale for every output)."""
        if self.per_tensor:
            return "per_tensor"
        return "per_channel" if self.group_size is None else self.group_size


@dataclass(frozen=True, kw_only=True, repr=False)
class Int8(_Weight):
    """int8 weights, symmetric in [-127, 127]: w = scale * q. By default every output has a scale.

    Attributes:
        group_size: a scale for so many consecutive channels of an output; None: one for all of
            them. The last group may be shorter: with group_size=64 an output of 100 channels has
            two scales, for 64 and for 36 channels.
        per_tensor: whether the whole matrix has one scale. Not with a group size.

    Raises:
        ValueError: a field is of another type, out of range, or does not go with the other; the
            error names it.

    Examples:
        >>> import sqjax as sq
        >>> sq.Int8(), sq.Int8(group_size=64).granularity, sq.Int8(per_tensor=True).granularity
        (Int8(), 64, 'per_tensor')
    """

    @property
    def fmt(self) -> Format:
        """The number format."""
        return INT8


@dataclass(frozen=True, kw_only=True, repr=False)
class Int4(_Weight):
    """int4 weights: w = scale * q with q in [-7, 7], or scale * (q - zero) with q in [-8, 7].

    Attributes:
        group_size: a scale (and a zero point) for so many consecutive channels of an output; None:
            one for all.
        per_tensor: whether the whole matrix has one scale. Not with a group size.
        zero_point: whether the range is that of the weights, [min, max], and not [-absmax, absmax].
        two_level: whether the groups have integer scales below one float scale for every output, so
            that the weights expand to int8 in integers: w = scale * group_scale * (q - zero)
            (QServe, Lin et al. 2024, arXiv 2405.04532). It needs a group size. Zero points are part
            of it, whatever `zero_point` says.

    Raises:
        ValueError: a field is of another type, out of range, or does not go with the others; the
            error names it.

    Examples:
        >>> import sqjax as sq
        >>> sq.Int4(group_size=128, zero_point=True).replace(group_size=64)
        Int4(group_size=64, zero_point=True)
        >>> sq.Int4(two_level=True)
        Traceback (most recent call last):
        ValueError: Int4.group_size: expected a group size with two_level=True, got None
    """

    zero_point: bool = False
    two_level: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("zero_point", "two_level"):
            if not isinstance(getattr(self, field), bool):
                raise _refusal(self, field, "True or False")
        if self.two_level and self.group_size is None:
            raise _refusal(
                self, "group_size", "a group size with two_level=True"
            )

    @property
    def fmt(self) -> Format:
        """The number format."""
        return INT4


@dataclass(frozen=True, kw_only=True, repr=False)
class Float8(_Weight):
    """float8 weights: w = scale * q, where q is a float of 8 bits.

    The steps between such floats grow with their magnitude.

    Attributes:
        format: "e4m3" (4 bits of exponent, 3 of mantissa: up to 448) or "e5m2" (up to 57344,
            coarser).
        group_size: a scale for so many consecutive channels of an output; None: one for all of
            them.
        per_tensor: whether the whole matrix has one scale. Not with a group size.

    Raises:
        ValueError: a field is of another type, out of range, or does not go with the others; the
            error names it.

    Examples:
        >>> import sqjax as sq
        >>> sq.Scheme(weight=sq.Float8(format="e5m2"), activation=None)
        Scheme(weight=Float8(format='e5m2'), activation=None)
    """

    format: Float8Format = "e4m3"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format not in ("e4m3", "e5m2"):
            raise _refusal(self, "format", "'e4m3' or 'e5m2'")

    @property
    def fmt(self) -> Format:
        """The number format."""
        return FORMATS[self.format]


# Activations --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, repr=False)
class _Activation(_Part):
    """The field that every quantized activation has: its number format."""

    format: ActivationFormat = "int8"

    def __post_init__(self) -> None:
        if self.format not in ("int8", "e4m3", "e5m2"):
            raise _refusal(self, "format", "'int8', 'e4m3' or 'e5m2'")

    @property
    def fmt(self) -> Format:
        """The number format."""
        return FORMATS[self.format]


@dataclass(frozen=True, kw_only=True, repr=False)
class PerToken(_Activation):
    """Activations with a scale for every token (row), computed at run time: the most accurate.

    Attributes:
        format: "int8", or with float8 weights "e4m3" or "e5m2".

    Raises:
        ValueError: an unknown format.

    Examples:
        >>> import sqjax as sq
        >>> sq.Scheme(weight=sq.Float8(), activation=sq.PerToken(format="e4m3")) == sq.FP8
        True
    """


@dataclass(frozen=True, kw_only=True, repr=False)
class PerTensor(_Activation):
    """Activations with one scale for all tokens, computed at run time.

    Attributes:
        format: "int8", or with float8 weights "e4m3" or "e5m2".

    Raises:
        ValueError: an unknown format.

    Examples:
        >>> import sqjax as sq
        >>> sq.W8A8_O2.activation
        PerTensor()
    """


@dataclass(frozen=True, kw_only=True, repr=False)
class Static(_Activation):
    """Activations with one scale, which calibration has found: the fastest.

    What lies beyond its range is clipped; NaN becomes 0.

    Attributes:
        range: what the scale covers: "absmax", the largest |x| that calibration saw; "mse", the
            range of least expected squared error; or a percentile of |x| as a fraction, such as
            0.9999. The last two need `calibrate(..., histogram=True)`, and go neither with
            smoothing at run time nor with outliers.
        format: "int8", or with float8 weights "e4m3" or "e5m2".

    Raises:
        ValueError: an unknown range or format.

    Examples:
        >>> import sqjax as sq
        >>> sq.W8A8_O3.replace(activation=sq.Static(range="mse"))
        Scheme(weight=Int8(), activation=Static(range='mse'))
        >>> sq.Static(range=99.99)
        Traceback (most recent call last):
        ValueError: Static.range: expected 'absmax', 'mse', or a percentile as a fraction in (0.0,
            1.0] such as 0.9999, got 99.99
    """

    range: Range = "absmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_range(self.range):
            ranges = "'absmax', 'mse', or a percentile as a fraction in (0.0, 1.0] such as 0.9999"
            raise _refusal(self, "range", ranges)


@dataclass(frozen=True, kw_only=True, repr=False)
class Indices(_Part):
    """The weight is an embedding table that is no head: it meets indices, and no activation.

    Examples:
        >>> import sqjax as sq
        >>> sq.EMBEDDING_INT8
        Scheme(weight=Int8(), activation=Indices())
    """


# Schemes ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, repr=False)
class Scheme(_Part):
    """How the weight and the activation of a matmul are quantized.

    It is checked when it is made. It is hashable, and no pytree: jax sees it as one leaf.

    Attributes:
        weight: `Int8`, `Int4` or `Float8`: the weight's format, and which of its elements share a
            scale.
        activation: `PerToken`, `PerTensor` or `Static`: where the activation's scales come from,
            and its format; or None: the activation stays float, only the weight is narrow.
            `Indices` is for embeddings that are no head, which meet indices: a scheme for those
            alone.
        smoothing: alpha in [0, 1] of smoothing at run time, or None: the weight becomes s W, and
            the activation's quantizer divides by s. For sites whose scale no leaf can absorb;
            elsewhere `smooth` gives the same for nothing.
        outliers: a threshold above 0, or None: channels whose activations exceeded it in
            calibration are multiplied in float (LLM.int8(), Dettmers et al. 2022, arXiv
            2208.07339).

    Raises:
        ValueError: a field is of another type, out of range, or does not go with the others; the
            error names it.

    Examples:
        >>> import sqjax as sq
        >>> sq.W8A8.replace(weight=sq.Int8(per_tensor=True), smoothing=0.5)
        Scheme(weight=Int8(per_tensor=True), activation=PerToken(), smoothing=0.5)
        >>> sq.EMBEDDING_INT8.replace(smoothing=0.5)
        Traceback (most recent call last):
        ValueError: Scheme.smoothing: expected None, because embeddings that are looked up have no
            activation to smooth, got 0.5
    """

    weight: Int8 | Int4 | Float8 = Int8()
    activation: PerToken | PerTensor | Static | Indices | None = PerToken()
    smoothing: float | None = None
    outliers: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.weight, Int8 | Int4 | Float8):
            raise _refusal(
                self, "weight", "Int8(...), Int4(...) or Float8(...)"
            )
        if self.activation is not None and not isinstance(
            self.activation, _Activation | Indices
        ):
            kinds = (
                "PerToken(...), PerTensor(...), Static(...), Indices() or None"
            )
            raise _refusal(self, "activation", kinds)
        self._check_formats()
        self._check_smoothing()
        self._check_outliers()
        self._check_range()

    def __repr__(self) -> str:
        # The two main fields are shown even where they are the defaults, because they say what the
        # scheme is.
        text = f"Scheme(weight={self.weight!r}, activation={self.activation!r}"
        if self.smoothing is not None:
            text += f", smoothing={self.smoothing!r}"
        if self.outliers is not None:
            text += f", outliers={self.outliers!r}"
        return text + ")"

    @property
    def quantizes_activation(self) -> bool:
        """Whether it quantizes the activation too, and not the weight alone."""
        return isinstance(self.activation, _Activation)

    @property
    def needs_histogram(self) -> bool:
        """Whether its static range comes from histograms: `calibrate(..., histogram=True)`."""
        return (
            isinstance(self.activation, Static)
            and self.activation.range != "absmax"
        )

    @property
    def measured(self) -> bool:
        """Whether it needs to know the ranges of the activations that `calibrate` saw."""
        static = isinstance(self.activation, Static)
        return static or self.smoothing is not None or self.outliers is not None

    def _check_formats(self) -> None:
        """A product takes two operands of one kind: integers (int4 becomes int8), or float8."""
        two_level = isinstance(self.weight, Int4) and self.weight.two_level
        if not isinstance(self.activation, _Activation):
            if two_level:
                why = "because two levels need them (without them leave two_level out)"
                raise _refusal(self, "activation", f"int8 activations, {why}")
            return
        if self.weight.fmt.floating != self.activation.fmt.floating:
            kinds = "int8 activations go with int8 or int4 weights, float8 ones with float8 weights"
            meaning = f"a format that goes with {self.weight!r} ({kinds})"
            raise _refusal(self, "activation", meaning)

    def _check_smoothing(self) -> None:
        if self.smoothing is None:
            return
        if not _is_number(self.smoothing) or not 0 <= self.smoothing <= 1:
            raise _refusal(self, "smoothing", "an alpha in [0, 1], or None")
        if isinstance(self.activation, Indices):
            meaning = "None, because embeddings that are looked up have no activation to smooth"
            raise _refusal(self, "smoothing", meaning)

    def _check_outliers(self) -> None:
        if self.outliers is None:
            return
        if not _is_number(self.outliers) or not self.outliers > 0:
            raise _refusal(self, "outliers", "a threshold above 0, or None")
        if not self.quantizes_activation:
            meaning = "None, because the activation stays float: it has no outliers to take apart"
            raise _refusal(self, "outliers", meaning)

    def _check_range(self) -> None:
        if self.needs_histogram and (
            self.smoothing is not None or self.outliers is not None
        ):
            why = (
                "because any other range comes from the histogram of X, not of X / s or of X "
                "without outliers (or smooth the parameters)"
            )
            meaning = f"range='absmax' with smoothing at run time and with outliers, {why}"
            raise _refusal(self, "activation", meaning)


#: W8A8 at the paper's efficiency level O1: per-token dynamic activations (the most accurate).
W8A8_O1 = Scheme(weight=Int8(), activation=PerToken())
#: O2: per-tensor dynamic activations.
W8A8_O2 = Scheme(weight=Int8(), activation=PerTensor())
#: O3: per-tensor static activations (the fastest; smoothing matters most here).
W8A8_O3 = Scheme(weight=Int8(), activation=Static())
W8A8 = W8A8_O1
#: W8A8 in which channels with |x| > 6 in calibration stay float: LLM.int8(), composes with
#: smoothing.
W8A8_OUTLIERS = Scheme(weight=Int8(), activation=PerToken(), outliers=6.0)
#: float8 weights and per-token activations.
FP8 = Scheme(weight=Float8(format="e4m3"), activation=PerToken(format="e4m3"))
FP8_E5M2 = Scheme(
    weight=Float8(format="e5m2"), activation=PerToken(format="e5m2")
)
#: int8 weights, float activations.
W8A16 = Scheme(weight=Int8(), activation=None)
#: int4 weights in groups with a zero point, float activations.
W4A16 = Scheme(weight=Int4(group_size=128, zero_point=True), activation=None)
W4A16_G64 = Scheme(weight=Int4(group_size=64, zero_point=True), activation=None)
#: int4 weights that expand to int8 in integers, int8 per-token activations.
W4A8 = Scheme(
    weight=Int4(group_size=128, zero_point=True, two_level=True),
    activation=PerToken(),
)
#: An int8 embedding table, a scale a row; and an int4 one in groups.
EMBEDDING_INT8 = Scheme(weight=Int8(), activation=Indices())
EMBEDDING_INT4 = Scheme(
    weight=Int4(group_size=64, zero_point=True), activation=Indices()
)
