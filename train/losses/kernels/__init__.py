"""The losses in Triton. Nothing here is imported until a Triton loss is first called.

cross_entropy   the rows' losses of a chunk of logits, and the gradient of the logits in place
"""
