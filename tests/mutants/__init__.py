"""Mutation testing: change the product's source in one place, in a copy, and see whether a test fails.

    python -m tests.mutants --seed 0 --count 60 [--only model/ …] [--jobs 1] [--limit SECONDS] [--out FILE.json] [--list]

    edits        which places of a file may change, and how: one function a kind of mutation
    draw         the mutants of a seed, spread over files in proportion to their code lines
    cover        the test files of a module, nearest first, derived from imports
    trial        a temporary copy of the work tree, pytest in it, and the result: killed, survived or timeout
"""
