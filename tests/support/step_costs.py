"""Step costs as tests want them."""

from swarmd.node.serving.step_cost import StepCost


def cost_of(row_cost: float, step_us: float = 10_000) -> StepCost:
    """What learns, from steps of two sizes, that one more row takes the part `row_cost`, 0 to 1, of a step's time."""
    cost = StepCost()
    for rows in (1, 5) * 200:
        round_trip_us = step_us * (1 + (rows - 1) * row_cost)
        link_us = step_us * (1 - row_cost) / 2
        cost.observe(rows, 1, round_trip_us - link_us, round_trip_us, alone=True)
    return cost
