"""The certificate: is an assignment of labels to a program's variables a legal change of variables?

It does not know how the labels were found: it shares no code with the search (`search`, `rules`,
`moves`), so that an error there is caught here. Labels are read as in `sqjax.folding.labels`: an
element with the label +(c + 1) shall become s[c] times what it was, with -(c + 1) it shall be
divided by s[c], with 0 it shall stay.

**The claim.** Let every equation that touches a labelled variable obey its primitive's *law*:
whenever its operands change as their labels say, so does its result. Let no label stand on an
output, nor on anything else that nobody may change (inputs, constants, carries, integers). Then,
for every positive s, the leaves can be changed as their labels say and the outputs stay what they
were: by induction over the equations, in order, every variable changes as its label says, and an
output's label is 0. That is what makes a fold lawful.

Example: h = x * norm, y = h @ w, with two channels.

    labels   x: none   norm: [-1, -2]   h: [[-1, -2]]   w: [[1], [2]]   y: none
    `mul`          0 + (-1), 0 + (-2) are the labels of h: the law holds
    `dot_general`  -1 meets 1, -2 meets 2: each product h[t, c] w[c, j] is unchanged, so is their
    sum: the law holds

With w: [[2], [1]] the channels would be exchanged: -1 meets 2, and s[1] / s[0] stays in the
product. Refused.

**In the body of a shard_map** the induction runs over pairs (variable, device). What a body is
given and returns carries no label, but for blocks of leaves. Between collectives every device
computes from its own values alone, and each equation there obeys its law. So device d may have a
vector s(d) of its own, provided that each block of a labelled leaf is scaled by one vector: that of
every device which holds it. A leaf that is sharded along a mesh axis is another block on every
device along it; so s(d) may differ along the mesh axes that shard every labelled leaf, and is one
vector along all others. A collective that sums or compares labelled values over devices is lawful
if s(d) is one vector along its axes, because then all terms of an element carry one scale.
`sqjax.folding.per_step` chooses the axes along which s(d) differs by these two rules. Every other
collective on labelled values (gathers, permutations) has no law here and is refused.
"""

from collections.abc import Mapping

import numpy as np

from sqjax.folding.claims import Claim, Labels
from sqjax.folding.laws import LAWS
from sqjax.program.equations import Var
from sqjax.program.facts import Program


def certify(program: Program, labels: Mapping[Var, Labels]) -> str | None:
    """None if the labels are lawful; otherwise what is wrong."""
    touched = {v for v, array in labels.items() if array.any()}
    for var in touched:
        problem = _fixed(program, var) or _fits(program, var, labels[var])
        if problem is not None:
            return problem
    for equation in program.touching(*sorted(touched)):
        if not _lawful(Claim.of(program, equation, labels)):
            return f"{equation} does not pass the scale on"
    return None


def _lawful(claim: Claim) -> bool:
    """Whether a claim obeys the law of its primitive; where there is no law nothing is lawful."""
    law = LAWS.get(claim.equation.name)
    return law is not None and law(claim)


def _fixed(program: Program, var: Var) -> str | None:
    """Why no scale may change a variable; None if one may."""
    if var in program.roots:
        return f"{program.roots[var]} can not be rescaled"
    if var in program.outputs:
        return f"{program.outputs[var]} would be rescaled"
    if var in program.barred:
        return program.barred[var]
    if not program.is_scalable(var):
        return (
            f"a value of dtype {program.avals[var].dtype} can not be rescaled"
        )
    return None


def _fits(program: Program, var: Var, labels: Labels) -> str | None:
    """What is wrong with the shape of a variable's labels; None if nothing is."""
    shape = program.shape(var)
    if labels.ndim != len(shape):
        return f"labels of rank {labels.ndim} on a value of rank {len(shape)}"
    fitting = np.equal(labels.shape, 1) | np.equal(labels.shape, shape)
    if not fitting.all():
        return f"labels of shape {labels.shape} on a value of shape {shape}"
    return None
