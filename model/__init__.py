"""The network and its weights.

Where to read first: `config` (what a network is made of), then bottom up, as a paper would introduce the parts:
`norm` · `position` · `mask` · `attention` · `cache` · `mlp` · `block` · `decoder`, and what is done with them:
`init` (first weights) · `hub` (folders in the Hugging Face layout) · `generate` (text out) · `families/` (one table per
published family) · `python -m model` (the command line).

The legend of shapes. A tensor's name ends in the letters of its axes, in order, and they mean the same in every file:

    B batch             T query positions     S key positions     N tokens, flattened
    D model width       H query heads         G key/value heads   K head width
    F feed-forward      V vocabulary          R adapter rank      L layers          E experts
    O, I   a weight's out and in features

so `q_BHTK @ k_BHSK.mT` is `score_BHTS`. A letter that is absent is an axis that is not there; `1` is an axis of size one.
"""
