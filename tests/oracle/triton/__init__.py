"""Triton's kernels beside their plain twins: what the tests of them in tests/oracle and tests/gpu share.

    harness     a process of its own, which interprets kernels or compiles them for cards that are not here
    loss        the head's loss: `train.losses.kernels.cross_entropy`
    lora        a linear layer with LoRA: `lora.kernels.lora_linear`
    quantize    4-bit weights, made and read: `quant.kernels.quantize_4bit`, `dequantize_4bit`
    products    products by a 4-bit weight: `quant.kernels.matmul_4bit`, `gemv_4bit`
    int8        INT8 products and rows: `quant.kernels.int8_matmul`, `int8_rows`
"""
