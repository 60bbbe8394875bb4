"""Triton's kernels for adapters. Nothing here is imported until one is first wanted.

lora_linear   a linear layer with its low-rank change: the forward in one kernel
"""
