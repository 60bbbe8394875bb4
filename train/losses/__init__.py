"""Losses, one a file. Each returns (sum, count) in float32 or wider; none divides: the step knows the global count.

cross_entropy   cross-entropy of the next token, the plain twins: all logits at once
chunked         the same, a few rows of logits at a time; the gradients are computed in the forward
kernels/        Triton's part of that on a GPU
choose          the losses by name, and the choice for `--loss auto`
"""
