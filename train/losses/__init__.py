"""Losses, one a file. Each returns (sum, count) in float32 or wider; none divides: the step knows the global count.

cross_entropy   of the next token, the plain twins: all logits at once
chunked         the same, a few rows at a time: their gradients are made on the way, the logits are never all there
kernels/        Triton's part of that on a GPU
choose          the losses by name, and which to take where
"""
