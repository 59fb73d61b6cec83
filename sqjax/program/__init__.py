"""A traced function: its equations and leaves, walking and evaluating it. Knows no quantization.

May import nothing of ours; and the small helpers `sqjax._*`.
"""
