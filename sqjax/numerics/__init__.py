"""Numbers on arrays: formats, ranges, integer matmuls. Knows no tree and no traced program.

May import nothing of ours; and the small helpers `sqjax._*`.
"""
