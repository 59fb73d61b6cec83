"""One option for every item, of least loss within a budget: the multiple-choice knapsack.

Item i has options k, each with a cost and a loss. Among the choices of one option for every item
whose costs add up to no more than the budget, that of the least sum of losses is wanted. `choose`
finds it exactly where the costs are multiples of one number that is not too small (a few counts of
bits times sizes of layers are), and nearly so elsewhere. `trade_off` gives the whole curve of best
losses, at the points that a price for cost reaches (Everett 1963, Operations Research 11(3): what
minimizes loss + price * cost is the best choice for the cost that it has).
"""

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

#: Cells of the table of `choose`. With more the costs are counted in coarser units.
MOST_UNITS = 1 << 14


class TradeOff(NamedTuple):
    """Choices from the cheapest to that of least loss, each better than all that cost less.

    Attributes:
        cost: of every choice, ascending.
        loss: of every choice, descending.
        choices: (points, items): the option of every item.
    """

    cost: np.ndarray
    loss: np.ndarray
    choices: np.ndarray


def choose(costs: np.ndarray, losses: np.ndarray, budget: float) -> np.ndarray:
    """The option of each item whose losses add up to least within the budget.

    The best of two: the point of `trade_off` just inside the budget, with what still fits into the
    rest; and dynamic programming over the costs in units of their greatest common divisor. More
    than `MOST_UNITS` of these are too many for a table; then the unit is larger, and costs are
    rounded up to it, so that the budget holds and the result is nearly best.

    Args:
        costs: (items, options), integers of 0 or more.
        losses: (items, options).
        budget: what the costs may add up to.

    Returns:
        (items,), positions among the options.

    Raises:
        ValueError: the cheapest options together exceed the budget.

    Examples:
        >>> import numpy as np
        >>> from sqjax.numerics.knapsack import choose
        >>> costs, losses = np.array([[4, 8], [4, 8]]), np.array([[3.0, 0.0], [5.0, 1.0]])
        >>> choose(costs, losses, budget=12).tolist()
        [0, 1]
    """
    costs = np.asarray(costs, np.int64)
    losses = np.asarray(losses, np.float64)
    least = int(costs.min(axis=1).sum())
    if least > budget:
        raise ValueError(
            f"expected a budget of at least {least}, what the cheapest options take together, got "
            f"{budget}"
        )
    curve = trade_off(costs, losses)
    inside = int(np.searchsorted(curve.cost, budget, side="right")) - 1
    found = [
        _filled(curve.choices[inside], costs, losses, budget),
        _by_table(costs, losses, budget),
    ]
    return min(found, key=lambda choice: _sum(losses, choice))


def trade_off(costs: np.ndarray, losses: np.ndarray) -> TradeOff:
    """The choices that minimize loss + price * cost, for every price from infinity to 0.

    Each item alone has such options too: the corners of the lower convex hull of its options. All
    steps from one corner to the next, of all items, are taken in the order of what they save for
    their cost.

    Args:
        costs: (items, options), integers.
        losses: (items, options).
    """
    costs = np.asarray(costs, np.int64)
    losses = np.asarray(losses, np.float64)
    corners = [_hull(*item) for item in zip(costs, losses, strict=True)]
    choice = np.array([first for first, *_ in corners])
    steps = []
    for item, options in enumerate(corners):
        for before, after in pairwise(options):
            saved = losses[item, before] - losses[item, after]
            paid = costs[item, after] - costs[item, before]
            steps.append((-saved / paid, item, after))
    choices = [choice]
    # Of one item the slopes fall from corner to corner, so its steps come in their order.
    for _, item, after in sorted(steps):
        choice = choice.copy()
        choice[item] = after
        choices.append(choice)
    return TradeOff(
        np.array([_sum(costs, choice) for choice in choices]),
        np.array([_sum(losses, choice) for choice in choices]),
        np.array(choices),
    )


def _sum(of_options: np.ndarray, choice: np.ndarray) -> Any:
    """The sum over all items, each at its choice."""
    return of_options[np.arange(len(choice)), choice].sum()


def _hull(costs: np.ndarray, losses: np.ndarray) -> list[int]:
    """The options at the corners of the lower convex hull, from the cheapest to the best.

    Example: the costs [4, 6, 8] with the losses [9, 8, 1] give [0, 2]: from 4 to 8 the line passes
    below the second option.
    """
    corners: list[int] = []
    for option in np.lexsort((losses, costs)).tolist():
        # It costs no less than the last corner, and must be better to be worth it.
        if corners and losses[option] >= losses[corners[-1]]:
            continue
        while len(corners) > 1 and _is_above(costs, losses, corners, option):
            corners.pop()
        corners.append(option)
    return corners


def _is_above(
    costs: np.ndarray, losses: np.ndarray, corners: list[int], option: int
) -> bool:
    """Whether the last corner lies above the line from the one before it to an option."""
    before, last = corners[-2:]
    until_last = (losses[last] - losses[before]) * (costs[option] - costs[last])
    from_last = (losses[option] - losses[last]) * (costs[last] - costs[before])
    return bool(until_last >= from_last)


def _filled(
    choice: np.ndarray, costs: np.ndarray, losses: np.ndarray, budget: float
) -> np.ndarray:
    """A choice with changes of one item each, the one that saves most first, while they fit."""
    choice = choice.copy()
    items = np.arange(len(choice))
    while True:
        rest = budget - _sum(costs, choice)
        paid = costs - costs[items, choice][:, None]
        saved = losses[items, choice][:, None] - losses
        saved = np.where(paid <= rest, saved, 0)
        item, option = np.unravel_index(np.argmax(saved), saved.shape)
        if not saved[item, option] > 0:
            return choice
        choice[item] = option


def _by_table(
    costs: np.ndarray, losses: np.ndarray, budget: float
) -> np.ndarray:
    """Dynamic programming: best[u] is the least loss of the items so far within u units."""
    # Only what is paid beyond the cheapest option of each item, because that much is paid anyway.
    above = costs - costs.min(axis=1, keepdims=True)
    # The minimum first, because a budget may be infinite.
    spare = int(min(budget - costs.min(axis=1).sum(), above.max(1).sum()))
    divisor = max(int(np.gcd.reduce(above, axis=None)), 1)
    unit = max(divisor, -(-spare // MOST_UNITS))
    units = spare // unit
    weights = -(-above // unit)  # rounded up, so that what fits here fits
    best = np.zeros(units + 1)
    chosen = np.zeros((len(costs), units + 1), np.int64)
    for item, (weight, loss) in enumerate(zip(weights, losses, strict=True)):
        each = np.full((len(loss), units + 1), np.inf)
        for option in np.flatnonzero(weight <= units):
            used = int(weight[option])
            each[option, used:] = best[: units + 1 - used] + loss[option]
        chosen[item] = np.argmin(each, axis=0)
        best = each.min(axis=0)

    # Back through the table: what the last item took tells how much the others had.
    choice = np.zeros(len(costs), np.int64)
    left = units
    for item in reversed(range(len(costs))):
        choice[item] = chosen[item, left]
        left -= int(weights[item, choice[item]])
    return choice
