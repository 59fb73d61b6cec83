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
        scopes += [{scan for scan, _ in program.leaf_views[v].stacked} for v in found if v in program.leaves]
        scans = tuple(sorted(set.intersection(*scopes)))
        return cls(program, scans, max(int(np.abs(labels).max()) for labels in found.values()))

    def of_leaf(self, var: Var, labels: Labels) -> Labels:
        """The labels of a variable as those of its leaf, in the leaf's axes."""
        view = self.program.leaf_views[var]
        spread = lab.put_axes(lab.take_axes(labels, view.long), view.permutation or (), len(view.shape))
        return self._stacked(spread, dict(view.stacked))

    def of_site(self, place: Place, activation: Labels | None) -> Labels:
        """The labels of a site's channels, in the order of `Site.channels`."""
        stacked, channels = place.view.stacked, place.site.channels
        if activation is None:
            return np.zeros(channels, int)
        shape = [self.program.shape(place.activation)[a] for a in place.axes]
        own = np.broadcast_to(-lab.take_axes(activation, place.axes), shape).reshape(channels[len(stacked) :])
        own = own.reshape((1,) * len(stacked) + own.shape)
        return np.broadcast_to(self._stacked(own, {scan: i for i, (scan, _) in enumerate(stacked)}), channels)

    def _stacked(self, labels: Labels, axis_of: Mapping[int, int]) -> Labels:
        """Other labels at each index of the axes that the scans run over."""
        lengths = [self.program.lengths[scan] for scan in self.scans]
        step = np.arange(int(np.prod(lengths))).reshape(lengths)
        offsets = lab.put_axes(step, [axis_of[scan] for scan in self.scans], labels.ndim)
        return np.where(labels == 0, 0, labels + np.sign(labels) * self.size * offsets)
