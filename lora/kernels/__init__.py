"""Triton kernels for adapters, imported when one is first used.

lora_linear   a linear layer with its low-rank change: the forward in one kernel
"""
