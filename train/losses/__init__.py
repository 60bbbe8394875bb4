"""Loss functions. Each returns (sum, count) in float32 or wider; the step divides by the count over micro-batches and ranks.

cross_entropy   cross-entropy of the next token, the reference implementations: all logits at once
chunked         the same, a few rows of logits at a time; the gradients are computed in the forward
weighted        the same with a weight for each label
kernels/        Triton's part of that on a GPU
choose          the losses by name, and the choice for `--loss auto`
"""
