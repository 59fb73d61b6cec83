"""The laws of convolutions and of sums and maxima under windows."""

from collections.abc import Sequence

import numpy as np

from sqjax.folding.claims import (
    Claim,
    Labels,
    are_equal,
    first_along,
    has_one_label,
    is_constant,
    product_of,
)


def convolve(claim: Claim) -> bool:
    """All products that are added up carry one label: the result's.

    They are added up over the taps of the window and over the channels of a group. No label may
    vary over positions and taps, so what is left is a table of products with the axes (images,
    groups, outputs of a group, channels of a group).

    Example: 2 channels in 2 groups, one output each: the image [-1, -2] and the kernel's outputs
    [1, 2] are (1, 2, 1, 1) both, their product is 0 everywhere, and so must be the result.
    """
    params, numbers = claim.params, claim.params["dimension_numbers"]
    [x, w], [y] = claim.xs, claim.ys
    over_positions = (
        (x, numbers.lhs_spec),
        (w, numbers.rhs_spec),
        (y, numbers.out_spec),
    )
    if params["batch_group_count"] != 1:
        return False
    if not all(is_constant(a, spec[2:]) for a, spec in over_positions):
        return False
    x, w, y = (_first_two(a, spec) for a, spec in over_positions)
    groups = params["feature_group_count"]
    # From (images, channels), (outputs, channels of a group) and (images, outputs).
    x = np.expand_dims(_apart(x, 1, groups), 2)
    w = np.expand_dims(_apart(w, 0, groups), 0)
    y = _apart(y, 1, groups)
    # (images, groups, 1, channels) and (1, groups, outputs, channels).
    product = product_of(x, w)
    return product is not None and has_one_label(product, (3,), y)


def _first_two(labels: Labels, spec: Sequence[int]) -> Labels:
    """The labels along the first two axes of a spec, which do not vary along the others."""
    others = tuple(range(2, len(spec)))
    return first_along(labels.transpose(spec), others).squeeze(others)


def _apart(labels: Labels, axis: int, groups: int) -> Labels:
    """The labels with an axis split into (groups, what is in a group)."""
    size = labels.shape[axis]
    # A label that holds all along the axis holds in every group.
    sizes = (1, 1) if size == 1 else (groups, size // groups)
    return labels.reshape(
        *labels.shape[:axis], *sizes, *labels.shape[axis + 1 :]
    )


def pool(claim: Claim) -> bool:
    """All under a window carry one label, that of the window's place; padding carries any."""
    [old] = map(claim.program.shape, claim.equation.inputs)
    [new] = map(claim.program.shape, claim.equation.outputs)
    sizes, padding = claim.params["window_dimensions"], claim.params["padding"]
    windowed, padded = np.greater(sizes, 1), np.any(padding, axis=-1)
    changed = windowed | padded | np.not_equal(old, new)
    touched = np.flatnonzero(changed).tolist()
    [x], [y] = claim.xs, claim.ys
    constant = is_constant(x, touched) and is_constant(y, touched)
    return constant and are_equal(
        first_along(x, touched), first_along(y, touched)
    )
