"""Triton twins of the losses. Nothing here is imported until a loss of Triton's is first called.

cross_entropy   a chunk of logits into the rows' losses and, in place, into its own gradient
"""
