"""Tables of text whose columns stand under each other."""

from collections.abc import Collection, Sequence


def aligned(
    rows: Sequence[Sequence[str]], left: Collection[int] = ()
) -> list[str]:
    """A line for each row, its cells padded to the width of their column.

    Example: [("a", "bb"), ("1", "2")] are "a  bb" and "1   2".

    Args:
        rows: texts, as many in each row.
        left: the columns that stand on the left, by number; all others stand on the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def padded(column: int, cell: str) -> str:
        pad = str.ljust if column in left else str.rjust
        return pad(cell, widths[column])

    # Without the spaces that a last column on the left ends with.
    return [
        "  ".join(padded(*numbered) for numbered in enumerate(row)).rstrip()
        for row in rows
    ]
