"""The command line and what it runs: the demo, the tables, the benchmarks.

May import everything; nothing imports it.
"""
