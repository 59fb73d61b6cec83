"""`inspect`: what calibration says of a model before anything is quantized.

Which matmuls there are, how large the outliers of their activations are, which leaves absorb whose
scales, what is refused and why, and how many bytes all of that takes.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sqjax._tables import aligned
from sqjax._trees import PyTree, named_leaves
from sqjax.calibration.calibrate import calibrate
from sqjax.calibration.stats import Stats, outlier_ratio
from sqjax.folding.graph import Graph, Site
from sqjax.report.kinds import Kind, kinds
from sqjax.weights.sizes import shown_bytes


@dataclass(frozen=True)
class SiteFacts:
    """One site.

    Attributes:
        path: its leaf.
        shape: the leaf's.
        bytes: the leaf's, in float.
        tokens: how many calibration saw there.
        largest: max |X| over channels and tokens.
        outlier_ratio: the largest channel's max |X| over that of the median channel, dead channels
            left out; 0 where calibration saw nothing.
        absorbed_by: the leaves that can absorb its smoothing scales.
        refused: why none can; "" where some do.
    """

    path: str
    shape: tuple[int, ...]
    bytes: int
    tokens: int
    largest: float
    outlier_ratio: float
    absorbed_by: tuple[str, ...]
    refused: str


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found. `str` of it is a text for a terminal, `as_dict` is for JSON.

    Attributes:
        sites: every leaf that an activation is multiplied with.
        floats: {leaf: why it stays float} of other leaves that matmuls read.
        tables: the embeddings that are no head.
        leaves: how many leaves the tree has.
        bytes: of the whole tree.
        site_bytes: of the sites' leaves.
        table_bytes: of the embeddings that are no head.
        graph: the fold groups and the refusals, as `print(stats.graph)` lists them.
    """

    sites: tuple[SiteFacts, ...]
    floats: Mapping[str, str]
    tables: tuple[str, ...]
    leaves: int
    bytes: int
    site_bytes: int
    table_bytes: int
    graph: str

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        rest = self.bytes - self.site_bytes - self.table_bytes
        lines = [
            f"{self.leaves} leaves, {shown_bytes(self.bytes)}: {len(self.sites)} sites of "
            f"{shown_bytes(self.site_bytes)}, {len(self.tables)} embeddings that are no head of "
            f"{shown_bytes(self.table_bytes)}, the rest {shown_bytes(rest)}",
            "",
            "Outliers: the largest |X| over that of the median channel",
            *_outlier_table(self.sites),
            "",
            self.graph,
        ]
        return "\n".join(lines)


def inspect(
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    mask: Callable[..., Any] | None = None,
    stats: Stats | None = None,
    progress: bool = False,
) -> Inspection:
    """Calibrates a model, and says what is in it.

    Args:
        fn: as for `sqjax.calibrate`.
        params: as for `sqjax.calibrate`.
        batches: as for `sqjax.calibrate`.
        mask: as for `sqjax.calibrate`.
        stats: what `calibrate` found for these parameters, if it is known: then no batch is read.
        progress: whether to show a progress bar.

    Raises:
        ValueError: what `sqjax.calibrate` refuses; the statistics are of another tree.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sqjax.report import inspect
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> params = {"norm": jnp.ones(2), "w": jnp.ones((2, 3))}
        >>> found = inspect(fn, params, [jnp.array([[1.0, 16.0]])])
        >>> found.sites[0].path, found.sites[0].absorbed_by, found.bytes
        ('w', ('norm',), 32)
    """
    if stats is None:
        stats = calibrate(fn, params, batches, mask=mask, progress=progress)
    paths, leaves, _ = named_leaves(params)
    sizes = {
        path: int(leaf.nbytes) for path, leaf in zip(paths, leaves, strict=True)
    }
    # What matmuls read in a way that is not known stays float: the graph says why.
    facts = site_facts(stats, sizes)
    sites = {site.path for site in facts}
    tables = tuple(site.path for site in stats.graph.tables)
    floats = {
        path: reason
        for path, reason in stats.graph.refused
        if path.partition("[")[0] not in sites
    }
    return Inspection(
        sites=facts,
        floats=floats,
        tables=tables,
        leaves=len(paths),
        bytes=sum(sizes.values()),
        site_bytes=sum(sizes[path] for path in sites),
        table_bytes=sum(sizes[path] for path in tables),
        graph=str(stats.graph),
    )


def site_facts(stats: Stats, sizes: Mapping[str, int]) -> tuple[SiteFacts, ...]:
    """The facts of every site, given the bytes of the leaves.

    Raises:
        ValueError: a site's leaf is not among these.
    """
    shapes = dict(stats.graph.leaves)
    missing = [s.path for s in stats.graph.sites if s.path not in sizes]
    if missing:
        raise ValueError(
            f"inspect: the statistics have the site {missing[0]}, which is no leaf of these "
            "parameters; pass the parameters that were calibrated"
        )
    return tuple(
        _facts(site, stats, shapes[site.path], sizes[site.path])
        for site in stats.graph.sites
    )


def _facts(
    site: Site, stats: Stats, shape: tuple[int, ...], size: int
) -> SiteFacts:
    absmax = np.asarray(stats.absmax[site.path])
    absorbers = absorbers_of(stats.graph, site.path)
    return SiteFacts(
        path=site.path,
        shape=shape,
        bytes=size,
        tokens=int(stats.count[site.path]),
        largest=float(absmax.max(initial=0)),
        outlier_ratio=outlier_ratio(absmax),
        absorbed_by=absorbers,
        refused="" if absorbers else refusal_of(stats.graph, site.path),
    )


def absorbers_of(graph: Graph, path: str) -> tuple[str, ...]:
    """The leaves that can absorb the smoothing scales of a site, of all its groups."""
    found: dict[str, None] = {}
    for group in graph.groups:
        if not group.keys and path in group.paths:
            # A fused kernel may absorb what another part of it is scaled by.
            found |= dict.fromkeys(group.absorbers)
    return tuple(found)


def refusal_of(graph: Graph, path: str) -> str:
    """Why a site is in no group; of a stack of matrices the reason of the first; "" if it is."""
    # A matrix of a stack is named with its index: layers/kernel[3].
    for name, reason in graph.refused:
        if name.partition("[")[0] == path:
            return reason
    return ""


def _outlier_table(sites: Iterable[SiteFacts]) -> list[str]:
    """A line for each kind of site: the median of its ratios, the largest, and where that is."""
    by_path = {site.path: site for site in sites}
    rows = [("sites", "median", "worst", "max |X|", "")]
    rows += [_outlier_row(kind, by_path) for kind in kinds(by_path)]
    # The name comes last, so that long ones push nothing aside.
    return [f"  {line}" for line in aligned(rows, left={4})]


def _outlier_row(
    kind: Kind, by_path: Mapping[str, SiteFacts]
) -> tuple[str, str, str, str, str]:
    own = [by_path[path] for path in kind.paths]
    ratios = [site.outlier_ratio for site in own]
    worst = own[int(np.argmax(ratios))]
    where = f" (the worst is {worst.path})" if len(own) > 1 else ""
    return (
        str(len(own)),
        f"{np.median(ratios):.3g}",
        f"{worst.outlier_ratio:.3g}",
        f"{max(site.largest for site in own):.3g}",
        f"{kind.label}{where}",
    )
