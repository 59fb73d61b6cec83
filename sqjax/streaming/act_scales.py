"""`stats_from_act_scales`: the activation scales of SmoothQuant's authors, as `Stats`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sqjax._arguments import expect
from sqjax._trees import check_arrays, check_finite
from sqjax.calibration.analysis import Analyses
from sqjax.calibration.calibrate import calibrated
from sqjax.calibration.measure import NOTHING_MORE
from sqjax.calibration.stats import Stats
from sqjax.folding.graph import Site
from sqjax.models.checkpoints.act_scales import (
    leaves_of_modules,
    read_act_scales,
)
from sqjax.models.checkpoints.family import Family
from sqjax.models.checkpoints.names import Found
from sqjax.models.encoder import Encoder
from sqjax.models.model import Model
from sqjax.weights.quantize import named

#: How many of the sites without numbers an error lists.
_SHOWN = 5


def stats_from_act_scales(
    act_scales: Any,
    model: Model | Encoder,
    params: Any,
    *,
    families: Sequence[Family] = (),
) -> Stats:
    """The `Stats` of a file of activation scales, as SmoothQuant's authors publish them.

    Such a file has max |X_j| of every Linear of a model, by the name that torch knows it by. What
    can be folded is found and proved here, on a few tokens; ranges of weights are the parameters'.
    The file says nothing else: a channel's sum is its maximum, of one token. So schemes that ask
    for histograms refuse these statistics.

    Args:
        act_scales: the path of a safetensors file, or {"model.layers.0.self_attn.q_proj": array of
            (input channels,), ...}. A .pt is a pickle, and is not read: the error says how torch
            writes it as safetensors.
        model: as `sqjax.models.load` or `load_encoder` gave it.
        params: its float parameters, with layers apart: not smoothed yet.
        families: where to look for the names, if no family that is known here has them.

    Returns:
        `Stats` whose `absmax` is the file's, for `smooth` and `quantize`.

    Raises:
        ValueError: what `calibrate` refuses of params; a name is no module of the model; a site has
            no numbers, or too many or few; numbers are negative or not finite. Names the module.

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> model = sq.models.Model(sq.models.llama_config(32, 8, 16, 1, 2, 1, 4))
        >>> params = model.init(jax.random.key(0))
        >>> inputs = {"q": 8, "k": 8, "v": 8, "o": 8}
        >>> layer = "model.layers.0"
        >>> act = {f"{layer}.self_attn.{x}_proj": jnp.ones(n) for x, n in inputs.items()}
        >>> inputs = {"gate": 8, "up": 8, "down": 16}
        >>> act |= {f"{layer}.mlp.{x}_proj": 3 * jnp.ones(n) for x, n in inputs.items()}
        >>> stats = sq.stats_from_act_scales(act | {"lm_head": jnp.ones(8)}, model, params)
        >>> float(stats.absmax["model/layers/0/mlp/up_proj/kernel"].max())
        3.0
    """
    expected = "a model as sqjax.models.load or load_encoder gives it"
    fits = isinstance(model, Model | Encoder)
    expect(fits, "stats_from_act_scales", expected, model)
    check_arrays(params)
    check_finite(params, "parameter")
    with named("stats_from_act_scales"):
        by_module = read_act_scales(act_scales)
        found = leaves_of_modules(by_module, model.config, families)
        batch = _batch(model)
        analyses = Analyses([model.apply], params, [batch], {}, False)
        # Before the proof, which compiles the model.
        sites = analyses.together(0, batch, 0).graph.sites
        absmax = _by_site(sites, found, by_module)
        seen = calibrated(analyses, [[batch]], None, NOTHING_MORE)
    # As though one token had the maximum in every channel, because the file counts none.
    ones = {path: jnp.asarray(np.int32(1)) for path in absmax}
    return replace(seen, absmax=absmax, abs_sum=absmax, count=ones, reached={})


def _batch(model: Model | Encoder) -> tuple[np.ndarray]:
    """The arguments of a model: a few tokens, any ones."""
    tokens = min(8, model.config.max_length)
    ids = np.arange(2 * tokens, dtype=np.int32).reshape(2, tokens)
    return (ids % model.config.vocab_size,)


def _by_site(
    sites: Iterable[Site],
    found: Mapping[str, Found],
    by_module: Mapping[str, np.ndarray],
) -> dict[str, Array]:
    """{site: max |X_j|}, from those of modules.

    A module that holds several leaves (q, k and v in one) gives its numbers to each. Experts whose
    channels share their statistics have the largest of theirs: of 2 experts with (1, 5) and (3, 2)
    these are (3, 5). An expert that saw no token is in no such file.
    """
    of_leaf: dict[str, dict[int | None, str]] = {}
    for name, one in found.items():
        for path in one.paths:
            of_leaf.setdefault(path, {})[one.entry] = name
    absmax, missing = {}, []
    for site in sites:
        values = np.zeros(site.channels, np.float32)
        for entry, name in of_leaf.get(site.path, {}).items():
            has_own = site.batch and entry is not None
            _raise_to(values[entry] if has_own else values, name, by_module)
        absmax[site.path] = jnp.asarray(values)
        # A site of which nothing is known would be smoothed as if it saw nothing.
        if site.path not in of_leaf:
            missing.append(site.path)
    if missing:
        raise ValueError(
            f"act_scales: expected numbers for every matmul, got none for {missing[:_SHOWN]} "
            f"({len(missing)} in all); layers must be apart (sqjax.models.unstack_layers)"
        )
    return absmax


def _raise_to(
    room: np.ndarray, name: str, by_module: Mapping[str, np.ndarray]
) -> None:
    """Raises the ranges of a site to those of a module, where these are larger."""
    values = by_module[name]
    if room.size != values.size:
        raise ValueError(
            f"{name}: expected {room.size} input channels, got {values.size}; are these another "
            "model's?"
        )
    np.maximum(room, values.reshape(room.shape), out=room)
