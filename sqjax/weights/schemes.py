"""`Scheme`: how a site is quantized, the small classes that it is made of, and the presets."""

import dataclasses
import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Literal, TypeVar, get_args

from sqjax.numerics.formats import FORMATS, INT4, INT8, Format, Granularity
from sqjax.numerics.ranges import Range, is_range

#: The formats of activations. int4 is for those without outliers, as a rotation makes them.
ActivationFormat = Literal["int8", "int4", "e4m3", "e5m2"]
Float8Format = Literal["e4m3", "e5m2"]
#: The blocks of a rotation at run time: all channels of a weight, or so many.
Rotation = Literal["hadamard"] | int

Part = TypeVar("Part", bound="_Part")


@dataclass(frozen=True, kw_only=True, repr=False)
class _Part:
    """What `Scheme` and its parts share: `replace`, and a repr that calls the constructor."""

    #: The fields that the repr shows even where they are the defaults.
    _always_shown: ClassVar[tuple[str, ...]] = ()

    def __repr__(self) -> str:
        arguments = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if field.name in self._always_shown
            or getattr(self, field.name) != field.default
        ]
        return f"{type(self).__name__}({', '.join(arguments)})"

    def replace(self: Part, **changes: Any) -> Part:
        """A copy with some fields changed. It is checked as any new one is."""
        return dataclasses.replace(self, **changes)


def _require(holds: bool, part: Any, field: str, expected: str) -> None:
    """Unless it holds, raises ValueError with the field of `part`, what is expected, what came."""
    if not holds:
        came = getattr(part, field)
        raise ValueError(
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
        fits = size is None or (type(size) is int and size >= 1)
        meaning = "an int of 1 or more (channels in a group), or None (one scale for an output)"
        _require(fits, self, "group_size", meaning)

        is_bool = isinstance(self.per_tensor, bool)
        _require(is_bool, self, "per_tensor", "True or False")

        one_of_both = size is None or not self.per_tensor
        meaning = "None with per_tensor=True (a tensor has one scale, or one for each group)"
        _require(one_of_both, self, "group_size", meaning)

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
            (QServe, Lin et al. 2024, arXiv 2405.04532). It needs a group size and zero points.

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
            is_bool = isinstance(getattr(self, field), bool)
            _require(is_bool, self, field, "True or False")
        has_groups = self.group_size is not None or not self.two_level
        meaning = "a group size with two_level=True"
        _require(has_groups, self, "group_size", meaning)
        has_zeros = self.zero_point or not self.two_level
        meaning = (
            "True with two_level=True, because two levels have zero points"
        )
        _require(has_zeros, self, "zero_point", meaning)

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
        block_size: a scale for a block of so many outputs and as many consecutive channels, as
            DeepSeek-V3 has it (128). Every output of a block holds it, so that the leaf is one in
            groups. Not with the two above.

    Raises:
        ValueError: a field is of another type, out of range, or does not go with the others; the
            error names it.

    Examples:
        >>> import sqjax as sq
        >>> sq.Scheme(weight=sq.Float8(format="e5m2"), activation=None)
        Scheme(weight=Float8(format='e5m2'), activation=None)
        >>> sq.FP8.replace(weight=sq.Float8(block_size=128)).weight.granularity
        128
    """

    format: Float8Format = "e4m3"
    block_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.format in ("e4m3", "e5m2")
        _require(known, self, "format", "'e4m3' or 'e5m2'")
        size = self.block_size
        fits = size is None or (type(size) is int and size >= 1)
        meaning = (
            "an int of 1 or more (a block's outputs and channels), or None"
        )
        _require(fits, self, "block_size", meaning)
        alone = self.group_size is None and not self.per_tensor
        meaning = "None with a group size or per_tensor=True"
        _require(size is None or alone, self, "block_size", meaning)

    @property
    def granularity(self) -> Granularity:
        """As for other weights; of blocks the channels of one."""
        own = super().granularity
        return own if self.block_size is None else self.block_size

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
        known = self.format in get_args(ActivationFormat)
        meaning = "'int8', 'int4', 'e4m3' or 'e5m2'"
        _require(known, self, "format", meaning)

    @property
    def fmt(self) -> Format:
        """The number format."""
        return FORMATS[self.format]


@dataclass(frozen=True, kw_only=True, repr=False)
class PerToken(_Activation):
    """Activations with a scale for every token (row), computed at run time: the most accurate.

    Attributes:
        format: "int8"; "int4", [-7, 7], multiplied as int8; with float8 weights "e4m3" or "e5m2".
        zero_point: whether the range is that of the token, [min, max] made to hold 0, and not
            [-absmax, absmax]; int4 only. Its 16 codes then have steps of (max - min) / 15, and not
            of absmax / 7: about half as large where all numbers have one sign, as after a ReLU. A
            product multiplies code - zero point, which int8 holds, so it needs no correction.

    Raises:
        ValueError: an unknown format, or a zero point in another one than int4.

    Examples:
        >>> import sqjax as sq
        >>> sq.Scheme(weight=sq.Float8(), activation=sq.PerToken(format="e4m3")) == sq.FP8
        True
        >>> sq.W4A4.replace(activation=sq.PerToken(format="int4", zero_point=True)).activation
        PerToken(format='int4', zero_point=True)
    """

    zero_point: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        is_bool = isinstance(self.zero_point, bool)
        _require(is_bool, self, "zero_point", "True or False")
        fits = self.format == "int4" or not self.zero_point
        why = (
            "because what is multiplied is code - zero point, which int8 holds for int4 alone: of "
            "int8 it is in [-255, 255], and float8 has no zero points"
        )
        meaning = f"False with format={self.format!r}, {why}"
        _require(fits, self, "zero_point", meaning)


@dataclass(frozen=True, kw_only=True, repr=False)
class PerTensor(_Activation):
    """Activations with one scale for all tokens, computed at run time.

    A row that holds NaN or infinity has no part in it. It is NaN on a CPU; on a GPU, where that
    would take time, NaN is taken as 0.

    Attributes:
        format: "int8"; "int4", [-7, 7], multiplied as int8; with float8 weights "e4m3" or "e5m2".

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

    What lies beyond its range is clipped. A row that holds NaN is NaN on a CPU; on a GPU, where
    that would take time, its NaN are taken as 0.

    Attributes:
        range: what the scale covers: "absmax", the largest |x| that calibration saw; "mse", the
            range of least expected squared error; or a percentile of |x| as a fraction, such as
            0.9999. The last two need `calibrate(..., histogram=True)`, and go neither with
            smoothing at run time nor with outliers.
        format: "int8"; "int4", [-7, 7], multiplied as int8; with float8 weights "e4m3" or "e5m2".

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
        ranges = "'absmax', 'mse', or a percentile as a fraction in (0.0, 1.0] such as 0.9999"
        _require(is_range(self.range), self, "range", ranges)


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
        rotation: "hadamard", or the channels of a block, or None: rotation at run time. The weight
            becomes Q W and the activation's quantizer multiplies by Q, an orthogonal matrix that
            spreads outliers over all channels, or over those of a block (see
            `sqjax.numerics.hadamard`): X W = (X Q)(Q W). With smoothing X is divided by s first. A
            block is fewer operations than all channels, and spreads less. Not with outliers.

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

    _always_shown = ("weight", "activation")

    weight: Int8 | Int4 | Float8 = Int8()
    activation: PerToken | PerTensor | Static | Indices | None = PerToken()
    smoothing: float | None = None
    outliers: float | None = None
    rotation: Rotation | None = None

    def __post_init__(self) -> None:
        # Each field alone comes first, because the checks of pairs below read several.
        is_weight = isinstance(self.weight, Int8 | Int4 | Float8)
        kinds = "Int8(...), Int4(...) or Float8(...)"
        _require(is_weight, self, "weight", kinds)

        is_activation = isinstance(
            self.activation, _Activation | Indices | None
        )
        kinds = "PerToken(...), PerTensor(...), Static(...), Indices() or None"
        _require(is_activation, self, "activation", kinds)
        self._check_formats()
        self._check_smoothing()
        self._check_outliers()
        self._check_rotation()
        self._check_range()

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
    def needs_sample(self) -> bool:
        """Whether its static range is of rotated activations: `calibrate(..., sample=512)`."""
        return self.rotation is not None and isinstance(self.activation, Static)

    @property
    def measured(self) -> bool:
        """Whether it needs to know the ranges of the activations that `calibrate` saw."""
        return isinstance(self.activation, Static) or self._changes_activation

    @property
    def _changes_activation(self) -> bool:
        """Whether the quantizer sees something else than X: X / s, or X without its outliers."""
        return self.smoothing is not None or self.outliers is not None

    def _check_formats(self) -> None:
        """A product takes two operands of one kind: integers (int4 becomes int8), or float8."""
        if isinstance(self.activation, _Activation):
            same = self.weight.fmt.floating == self.activation.fmt.floating
            kinds = (
                "int8 and int4 activations go with int8 or int4 weights, float8 ones with float8 "
                "weights"
            )
            meaning = f"a format that goes with {self.weight!r} ({kinds})"
            _require(same, self, "activation", meaning)
        elif isinstance(self.weight, Int4):
            why = "because two levels need them (without them leave two_level out)"
            meaning = f"int8 activations, {why}"
            _require(not self.weight.two_level, self, "activation", meaning)

    def _check_smoothing(self) -> None:
        if self.smoothing is None:
            return
        # NaN is outside too, because every comparison with it is false.
        is_alpha = _is_number(self.smoothing) and 0 <= self.smoothing <= 1
        _require(is_alpha, self, "smoothing", "an alpha in [0, 1], or None")
        meets_activations = not isinstance(self.activation, Indices)
        meaning = "None, because embeddings that are looked up have no activation to smooth"
        _require(meets_activations, self, "smoothing", meaning)

    def _check_outliers(self) -> None:
        if self.outliers is None:
            return
        # Not NaN, and not infinity, which no channel exceeds: that is None.
        is_threshold = (
            _is_number(self.outliers) and 0 < self.outliers < math.inf
        )
        meaning = "a finite threshold above 0, or None"
        _require(is_threshold, self, "outliers", meaning)
        meaning = "None, because the activation stays float: it has no outliers to take apart"
        _require(self.quantizes_activation, self, "outliers", meaning)

    def _check_rotation(self) -> None:
        rotation = self.rotation
        if rotation is None:
            return
        is_block = type(rotation) is int and rotation >= 2
        meaning = (
            "'hadamard', an int of 2 or more (channels in a block), or None"
        )
        _require(rotation == "hadamard" or is_block, self, "rotation", meaning)
        meets_activations = not isinstance(self.activation, Indices)
        meaning = "None, because embeddings that are looked up have no activation to rotate"
        _require(meets_activations, self, "rotation", meaning)
        meaning = "None with a rotation, which leaves no channel of its own to an outlier"
        _require(self.outliers is None, self, "outliers", meaning)

    def _check_range(self) -> None:
        changes = self._changes_activation or self.rotation is not None
        sees_the_range = not (self.needs_histogram and changes)
        why = (
            "because any other range comes from the histogram of X, not of X / s, of X without "
            "outliers or of X Q (or smooth the parameters)"
        )
        meaning = (
            "range='absmax' with smoothing at run time, with outliers and with a rotation, "
            f"{why}"
        )
        _require(sees_the_range, self, "activation", meaning)


#: W8A8 at the paper's efficiency level O1: per-token dynamic activations (the most accurate).
W8A8_O1 = Scheme(weight=Int8(), activation=PerToken())
#: O2: per-tensor dynamic activations.
W8A8_O2 = Scheme(weight=Int8(), activation=PerTensor())
#: O3: per-tensor static activations (the fastest; smoothing matters most here).
W8A8_O3 = Scheme(weight=Int8(), activation=Static())
#: The same of rotated activations, which have no large channels; calibrate with sample=512.
W8A8_O3_ROTATED = W8A8_O3.replace(rotation="hadamard")
#: The usual choice.
W8A8 = W8A8_O1
#: W8A8 in which channels with |x| > 6 in calibration stay float: LLM.int8(), composes with
#: smoothing.
W8A8_OUTLIERS = Scheme(weight=Int8(), activation=PerToken(), outliers=6.0)
#: float8 weights and per-token activations.
FP8 = Scheme(weight=Float8(format="e4m3"), activation=PerToken(format="e4m3"))
#: The same in the float8 of wider range and coarser steps.
FP8_E5M2 = Scheme(
    weight=Float8(format="e5m2"), activation=PerToken(format="e5m2")
)
#: int8 weights, float activations.
W8A16 = Scheme(weight=Int8(), activation=None)
#: int4 weights in groups with a zero point, float activations.
W4A16 = Scheme(weight=Int4(group_size=128, zero_point=True), activation=None)
#: Smaller groups: nearer to the float weights, and a little larger.
W4A16_G64 = Scheme(weight=Int4(group_size=64, zero_point=True), activation=None)
#: int4 weights that expand to int8 in integers, int8 per-token activations.
W4A8 = Scheme(
    weight=Int4(group_size=128, zero_point=True, two_level=True),
    activation=PerToken(),
)
#: The same with int4 per-token activations; rotated ones are fit for so few bits.
W4A4 = W4A8.replace(activation=PerToken(format="int4"))
W4A4_ROTATED = W4A4.replace(rotation="hadamard")
#: An int8 embedding table, a scale a row; and an int4 one in groups.
EMBEDDING_INT8 = Scheme(weight=Int8(), activation=Indices())
EMBEDDING_INT4 = Scheme(
    weight=Int4(group_size=64, zero_point=True), activation=Indices()
)

#: The presets by their names, which rules may say in place of them.
PRESETS = {
    "W8A8": W8A8,
    "W8A8_O1": W8A8_O1,
    "W8A8_O2": W8A8_O2,
    "W8A8_O3": W8A8_O3,
    "W8A8_O3_ROTATED": W8A8_O3_ROTATED,
    "W8A8_OUTLIERS": W8A8_OUTLIERS,
    "FP8": FP8,
    "FP8_E5M2": FP8_E5M2,
    "W8A16": W8A16,
    "W4A16": W4A16,
    "W4A16_G64": W4A16_G64,
    "W4A8": W4A8,
    "W4A4": W4A4,
    "W4A4_ROTATED": W4A4_ROTATED,
    "EMBEDDING_INT8": EMBEDDING_INT8,
    "EMBEDDING_INT4": EMBEDDING_INT4,
}


def scheme_of(given: Any, where: str) -> Scheme:
    """A scheme itself, or the preset of this name.

    Raises:
        ValueError: it is neither; names `where`.
    """
    scheme = PRESETS.get(given, given) if isinstance(given, str) else given
    if not isinstance(scheme, Scheme):
        raise ValueError(
            f"{where}: expected a Scheme such as sqjax.W8A8, or the name of a preset "
            f"({', '.join(PRESETS)}), got {given!r}"
        )
    return scheme
