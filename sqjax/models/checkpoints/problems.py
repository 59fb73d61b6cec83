"""One error for all problems of a checkpoint."""

from collections.abc import Sequence

#: How many problems an error lists.
_SHOWN = 30


def raise_problems(source: str, problems: Sequence[str]) -> None:
    """Raises one ValueError with all problems (the first of very many), if there are any."""
    if problems:
        lines = list(problems[:_SHOWN])
        if len(problems) > len(lines):
            lines = [*lines, f"and {len(problems) - len(lines)} more"]
        raise ValueError(
            f"{source} does not hold the model that its configuration describes; "
            f"{len(problems)} problem(s), so use a complete checkpoint of a supported model:\n  "
            + "\n  ".join(lines)
        )
