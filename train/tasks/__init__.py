"""What each objective makes of text, and how one sees whether it learns: one file an objective.

`task` is what they have in common · `causal` the next token · `masked` the masked token.
"""
