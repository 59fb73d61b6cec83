"""The proof in a finite field: a program run with residues modulo a prime in place of floats.

To be read in this order:

    values      what a variable holds: residues, or an array as jax computes it
    rules       what each primitive does with residues (with movements and products, two parts of
                the table)
    running     a program, equation by equation
    changes     scales, rotations and permutations of leaves that are residues
    proof       `prove`: do all outputs stay the same numbers?

It shares no code with the search, its rules, or the laws of the certificate: an error in one of
them is caught here.

May import `folding`, of which it reads what a group and a space are; `program` and `numerics`; and
the small helpers `sqjax._*`.
"""
