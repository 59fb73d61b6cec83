"""`sqjax.numerics.knapsack`, beside trying every choice there is."""

from itertools import product

import numpy as np
import pytest

from sqjax.numerics import knapsack
from sqjax.numerics.knapsack import choose, trade_off


def instance(seed, items=5, options=3, unit=1):
    """Costs that grow with the option, and losses that mostly fall, as those of formats do."""
    rng = np.random.default_rng(seed)
    costs = unit * np.cumsum(rng.integers(1, 9, (items, options)), axis=1)
    losses = np.sort(rng.exponential(size=(items, options)), axis=1)[:, ::-1]
    losses[rng.random(losses.shape) < 0.1] += 1  # an option that is worse than a cheaper one
    return costs, losses


def totals(costs, losses):
    """(cost, loss) of every choice."""
    rows = np.arange(len(costs))
    options = np.array(list(product(range(costs.shape[1]), repeat=len(costs))))
    return costs[rows, options].sum(1), losses[rows, options].sum(1)


def total(of_options, choice):
    return of_options[np.arange(len(choice)), choice].sum()


@pytest.mark.parametrize("seed", range(5))
def test_no_choice_within_the_budget_is_better(seed):
    costs, losses = instance(seed)
    paid, lost = totals(costs, losses)
    for budget in np.linspace(paid.min(), paid.max() + 3, 9).tolist():
        found = choose(costs, losses, budget)
        assert total(costs, found) <= budget
        assert total(losses, found) == pytest.approx(lost[paid <= budget].min(), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_coarser_units_keep_to_the_budget_and_lose_little(seed, monkeypatch):
    costs, losses = instance(seed, items=6, unit=1001)
    costs = costs + np.arange(18).reshape(6, 3)  # no common divisor any more
    monkeypatch.setattr(knapsack, "MOST_UNITS", 64)
    paid, lost = totals(costs, losses)
    budget = float(paid.min() + paid.max()) / 2
    found = choose(costs, losses, budget)
    assert total(costs, found) <= budget
    # Rounding up wastes at most one unit of 64 an item: what is best with a budget that much less.
    less = paid <= budget - 6 * (budget - paid.min()) / 64
    assert total(losses, found) <= lost[less].min() + 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_the_curve_is_the_lower_hull_of_all_choices(seed):
    costs, losses = instance(seed)
    paid, lost = totals(costs, losses)
    curve = trade_off(costs, losses)
    assert curve.cost[0] == paid.min()
    assert curve.loss[-1] == pytest.approx(lost.min())
    assert (np.diff(curve.cost) > 0).all()
    assert (np.diff(curve.loss) < 0).all()
    for price in np.geomspace(1e-4, 10, 50):
        wanted = (lost + price * paid).min()
        assert (curve.loss + price * curve.cost).min() == pytest.approx(wanted)
    for cost, loss, choice in zip(*curve, strict=True):
        assert (total(costs, choice), total(losses, choice)) == pytest.approx((cost, loss))


def test_a_budget_below_the_cheapest_options_is_refused():
    costs, losses = instance(0)
    with pytest.raises(ValueError, match=f"at least {costs.min(1).sum()}"):
        choose(costs, losses, float(costs.min(1).sum()) - 1)
