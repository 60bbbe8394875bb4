"""Triton kernels of this folder; importing one imports triton.

    lora_linear   a linear layer with its low-rank change, the forward in one kernel
"""
