"""Paths of many layers as a few kinds: layers/0/q_proj and layers/1/q_proj are of one."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

#: The number of a layer: the first number that ends a key of the path.
_NUMBER = re.compile(r"(?<![^/_])\d+(?=/|$)")
#: Last keys of a path that say nothing of which leaf it is.
_LAST = ("kernel", "weight", "w")


class Kind(NamedTuple):
    """Sites that differ by the number of their layer only.

    Attributes:
        label: a short name: "mlp/down_proj".
        numbers: of the layers, ascending; empty for a site without a number.
        paths: the sites', in that order.
    """

    label: str
    numbers: tuple[int, ...]
    paths: tuple[str, ...]


def split_number(path: str) -> tuple[str, int | None]:
    """(the path with # for the layer's number, the number); None where there is none.

    Example: "layers/11/mlp/up/kernel" gives ("layers/#/mlp/up/kernel", 11).
    """
    found = _NUMBER.search(path)
    if found is None:
        return path, None
    return f"{path[: found.start()]}#{path[found.end() :]}", int(found.group())


def kinds(paths: Iterable[str]) -> list[Kind]:
    """The kinds of some sites, in the order in which they come first.

    A site without a number, or whose kind no other is of, is a kind of its own.
    """
    members: dict[str, dict[int | None, str]] = {}
    # By what is left without the number, in the order of the program.
    for path in paths:
        pattern, number = split_number(path)
        members.setdefault(pattern, {})[number] = path
    found = []
    for pattern, by_number in members.items():
        numbered = sorted(
            (n, path) for n, path in by_number.items() if n is not None
        )
        numbers = tuple(number for number, _ in numbered)
        of_kind = tuple(path for _, path in numbered)
        found.append(
            Kind(label(pattern), numbers, of_kind or (by_number[None],))
        )
    return found


def label(pattern: str) -> str:
    """A short name: what follows the layer's number, without a last key such as "kernel".

    Example: "layers/#/mlp/up/kernel" is "mlp/up"; "Dense_#/kernel" stays, because "kernel" alone
    says nothing.
    """
    keys = pattern.rpartition("#/")[2].split("/")
    if len(keys) == 1 and keys[0] in _LAST:
        return "/".join(pattern.split("/")[-2:])
    if len(keys) > 1 and keys[-1] in _LAST:
        keys.pop()
    return "/".join(keys[-3:])


def merged(
    found: Iterable[Kind], values: Mapping[str, float]
) -> list[tuple[Kind, tuple[float, ...]]]:
    """(kind, its values) where kinds with the same values, which share an activation, are one.

    Example: q, k and v see one activation: their three kinds are the kind "q_proj, k_proj, v_proj".
    """
    by_values: dict[tuple[tuple[int, ...], tuple[float, ...]], list[Kind]] = {}
    # By the numbers of layers too: kinds of other layers may have the same values by chance.
    for kind in found:
        own = tuple(values[path] for path in kind.paths)
        by_values.setdefault((kind.numbers, own), []).append(kind)
    rows = []
    for (_, own), same in by_values.items():
        names = ", ".join(kind.label.rpartition("/")[2] for kind in same)
        shared = same[0]._replace(label=names) if len(same) > 1 else same[0]
        rows.append((shared, own))
    return rows
