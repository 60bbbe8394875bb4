"""Objectives of one file each that nobody needs: `--objective tests/seam/NAME.py` shows that a file is all it takes.

    toy            the next token of each record's text
    next_sentence  pairs of neighbouring records, or of any two: a random transform, two texts, a pooled head
    preference     pairs that stay together, learned beside a frozen reference (DPO)
    rollout        batches that the network makes itself, at each step, with state in the checkpoint
"""
