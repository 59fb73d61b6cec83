"""Which scales can move through a program, and why that is right: the search, the certificate, the
fold.

May import `program`; and the small helpers `sqjax._*`.
"""
