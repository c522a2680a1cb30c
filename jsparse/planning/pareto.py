"""A rule for each head, the best for several lengths at once: the plans that no other beats.

Fu et al. 2024, arXiv:2406.14909: a 0/1 program with several objectives, solved for one
of them at a time while the others are held inside ranges.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jsparse import checks

Range = tuple[float, float]
# of a range's end that is itself the loss of a plan, summed in another order
_ROUNDING = 1e-9


class Program(NamedTuple):
    """What every rule would do to every head, and what all of them together may cost.

    Attributes:
      loss: What a head with a rule adds to each objective, at least 0.
      cost: What a head with a rule costs, under each bound.
      budget: Most that all heads may cost together, under each bound.
      least_spent: Share of each budget that has to be spent.
      most_rules: Most different rules in a layer.
    """

    loss: Float[np.ndarray, "objectives layers heads rules"]
    cost: Float[np.ndarray, "bounds rules"]
    budget: Float[np.ndarray, " bounds"]
    least_spent: float = 0.9
    most_rules: int = 2

    @property
    def bounds(self) -> str:
        """What a plan has to keep to, in words."""
        least = ", ".join(f"{self.least_spent * most:g} to {most:g}" for most in self.budget)
        return f"costs of {least} in all with at most {self.most_rules} rules in a layer"

    def losses(self, plan: Int[np.ndarray, "layers heads"]) -> Float[np.ndarray, " objectives"]:
        """Each objective of a plan, which is a rule's number for every head."""
        return np.take_along_axis(self.loss, plan[None, ..., None], -1).sum((1, 2, 3))


Solve = Callable[[Program, int, Mapping[int, Range]], Int[np.ndarray, "layers heads"] | None]


def solve(
    program: Program, objective: int, ranges: Mapping[int, Range], *, time_limit: float = 60.0
) -> Int[np.ndarray, "layers heads"] | None:
    """The plan of least loss in one objective, others inside ranges; None where there is none.

    Solved by the branch-and-cut of SciPy's HiGHS.

    Args:
      program: Losses, costs and bounds.
      objective: Which loss is made small.
      ranges: Least and most of other objectives.
      time_limit: Seconds after which the best plan found so far is taken.
    """
    # on first use: the methods and the other searches do without it
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    _, layers, heads, rules = program.loss.shape
    taken, used = layers * heads * rules, layers * rules
    # losses as shares of the largest that there can be: the solver's tolerances are absolute
    scale = program.loss.max(-1, initial=0.0).sum((1, 2))
    scale = np.where(scale > 0, scale, 1.0)
    loss = (program.loss / scale[:, None, None, None]).reshape(len(scale), taken)
    nothing = np.zeros(used)

    def total(row: np.ndarray) -> sparse.csr_array:
        return sparse.csr_array(np.concatenate([row, nothing])[None])

    one_each = sparse.kron(sparse.eye_array(layers * heads), np.ones((1, rules)))
    of_layer = sparse.kron(
        sparse.eye_array(layers), sparse.kron(np.ones((heads, 1)), sparse.eye_array(rules))
    )
    constraints = [
        LinearConstraint(sparse.hstack([one_each, sparse.csr_array((layers * heads, used))]), 1, 1),
        # a rule that a head takes is one that its layer uses
        LinearConstraint(sparse.hstack([sparse.eye_array(taken), -of_layer]), -np.inf, 0),
        LinearConstraint(
            sparse.hstack(
                [
                    sparse.csr_array((layers, taken)),
                    sparse.kron(sparse.eye_array(layers), np.ones((1, rules))),
                ]
            ),
            0,
            program.most_rules,
        ),
    ]
    for cost, budget in zip(program.cost, program.budget, strict=True):
        spent = total(np.tile(cost / budget, layers * heads))
        constraints.append(LinearConstraint(spent, program.least_spent, 1))
    for other, (low, high) in ranges.items():
        inside = low / scale[other] - _ROUNDING, high / scale[other] + _ROUNDING
        constraints.append(LinearConstraint(total(loss[other]), *inside))
    found = milp(
        np.concatenate([loss[objective], nothing]),
        integrality=np.ones(taken + used),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"time_limit": time_limit},
    )
    if found.x is None:
        return None
    return found.x[:taken].reshape(layers, heads, rules).argmax(-1)


def grid_of(front: Float[np.ndarray, "plans objectives"], ranges: int) -> list[tuple[int, dict]]:
    """Which objective to make small with the others inside which ranges, for each in turn.

    Every objective is split into so many equal ranges between its least and its most in `front`.
    """
    ends = np.linspace(front.min(0), front.max(0), ranges + 1)
    steps = []
    for objective in range(front.shape[1]):
        others = [o for o in range(front.shape[1]) if o != objective]
        for parts in itertools.product(range(ranges), repeat=len(others)):
            inside = {
                o: (float(ends[part, o]), float(ends[part + 1, o]))
                for o, part in zip(others, parts, strict=True)
            }
            steps.append((objective, inside))
    return steps


def programs_to_solve(objectives: int, ranges: int) -> int:
    """How many programs `pareto_front` solves."""
    return objectives + (objectives * ranges ** (objectives - 1) if objectives > 1 else 0)


def pareto_front(
    program: Program, *, ranges: int = 4, solve: Solve = solve
) -> list[Int[np.ndarray, "layers heads"]]:
    """Plans within all bounds of which none is better in one objective and no worse in the others.

    Each objective is made small alone, which shows between what values it varies; then each again
    for every choice of ranges of the others.

    Args:
      program: Losses, costs and bounds.
      ranges: Into how many the values of an objective are split; 4 in the authors' code.
      solve: What solves for one objective.

    Raises:
      ValueError: if no plan keeps to the bounds.
    """
    count = len(program.loss)
    found = [solve(program, objective, {}) for objective in range(count)]
    checks.some_plan(found, program.bounds)
    plans = [plan for plan in found if plan is not None]
    if count > 1:
        ends = np.stack([program.losses(plan) for plan in plans])
        others = (solve(program, *step) for step in grid_of(ends, ranges))
        plans += [plan for plan in others if plan is not None]
    losses = np.stack([program.losses(plan) for plan in plans])
    return [plans[n] for n in np.flatnonzero(undominated(losses))]


def undominated(losses: Float[np.ndarray, "plans objectives"]) -> Bool[np.ndarray, " plans"]:
    """Which plans no other beats; of equal ones the first."""
    no_worse = (losses[:, None] <= losses[None]).all(-1)
    better = no_worse & ~no_worse.T
    earlier = no_worse & no_worse.T & np.tri(len(losses), k=-1, dtype=bool).T
    return np.asarray(~(better | earlier).any(0))
