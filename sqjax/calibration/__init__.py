"""What every matmul saw: `calibrate`, `Stats`, and the proof that a fold changes nothing.

May import `folding`, `program` and `numerics`; and the small helpers `sqjax._*`.
"""
