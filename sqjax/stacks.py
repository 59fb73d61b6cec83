"""`Stack`: one scale vector a step, where a group lives in the body of a scan over stacked leaves.

What is lawful at every step of a scan for one s is lawful for another s at each step, if all that the group labels
lives in the body, and every leaf of it is a slice of its own.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from sqjax import labels as lab
from sqjax.labels import Labels
from sqjax.program import Program, Var
from sqjax.sites import Place


class Stack(NamedTuple):
    """The scans over whose steps a group's scales are stacked, outermost first, and the number of scales a step."""

    program: Program
    scans: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, program: Program, found: Mapping[Var, Labels]) -> "Stack":
        """Those scans around every labelled variable that run over every labelled leaf."""
        scopes = [set(program.scopes[v]) for v in found]
        scopes += [set(program.leaf_views[v].stacked) for v in found if v in program.leaves]
        scans = tuple(sorted(set.intersection(*scopes)))
        return cls(program, scans, max(int(np.abs(labels).max()) for labels in found.values()))

    def of_leaf(self, var: Var, labels: Labels) -> Labels:
        """The labels of a variable as those of its leaf, in the leaf's axes."""
        view = self.program.leaf_views[var]
        places = [(i, axis) for i, axis in enumerate(view.places or ()) if axis is not None]
        own = lab.take_axes(labels, [i for i, _ in places])
        spread = lab.put_axes(own, [axis for _, axis in places], len(view.shape))
        return self.along(spread, view.stacked)

    def of_site(self, place: Place, activation: Labels | None) -> Labels:
        """The labels of a site's channels, in the order of `Site.channels`."""
        taken, channels = place.view.taken, place.site.channels
        labels = np.zeros(channels, int)
        if activation is not None:
            shape = [self.program.shape(place.activation)[a] for a in place.axes]
            own = np.broadcast_to(-lab.take_axes(activation, place.axes), shape)
            own = own.reshape((1,) * len(taken) + channels[len(taken) :])
            spread = self.along(own, {t.scan: i for i, t in enumerate(taken) if t.scan is not None})
            labels[place.entry] = np.broadcast_to(spread, channels)[place.entry]
        return labels

    def along(self, labels: Labels, axis_of: Mapping[int, int]) -> Labels:
        """Other labels at each index of the axes that the scans run over."""
        lengths = [self.program.lengths[scan] for scan in self.scans]
        step = np.arange(int(np.prod(lengths))).reshape(lengths)
        offsets = lab.put_axes(step, [axis_of[scan] for scan in self.scans], labels.ndim)
        return np.where(labels == 0, 0, labels + np.sign(labels) * self.size * offsets)
