"""Which scales can move through a program, and why: the search, the certificate, the fold.

To be read in this order:

    labels      what is written on a variable: which channel's scale each of its elements carries
    sites       where an activation meets a leaf; there the search begins
    search      labels spread through the program until nothing more is forced, or something refuses
    rules       what each primitive does with labels (with moves and ties, its helpers)
    certificate the proof that the labels found are lawful, by laws that know nothing of the search
    laws        what each primitive's operands and results must carry, read by the certificate
                (with claims and convolution_laws)
    groups      labels on variables as a fold group: which leaves absorb, which sites are smoothed
    per_step    one scale vector for each step of a scan, or for each device
    find_graph  all groups of a program, as data (graph); attention_keys, embeddings: two more finds
    apply       the fold itself
    find_spaces  what may be rotated (space), by a search of its own (space_search, with space_rules
                and space_moves) and its own certificate (space_certificate)

May import `program`; and the small helpers `sqjax._*`.
"""
