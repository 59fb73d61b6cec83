"""A traced function: its equations, its leaves, walking and evaluating it. Knows nothing of quantization.

May import nothing of ours; and the small helpers `sqjax._*`.
"""
