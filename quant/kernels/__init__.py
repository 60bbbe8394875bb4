"""Triton kernels for low-bit weights. None is imported before it is first used.

`quantize_4bit` quantizes a weight, as `quant.nf4.quantize` · `dequantize_4bit` dequantizes it, scales included, as
`quant.nf4.dequantize` · `matmul_4bit` multiplies by a 4-bit weight, dequantized tile by tile · `gemv_4bit` the same for up to
eight rows, as in generation · `choice` chooses among these by the number of rows · `int8_rows` quantizes rows of x to INT8, as
`quant.int8_linear.DynamicInput` · `int8_matmul` multiplies INT8 matrices, as `quant.int8_product`.
"""
