"""Quantized trees in files and directories, and as arguments of exported functions.

May import `weights` and `numerics`; and the small helpers `sqjax._*`.
"""
