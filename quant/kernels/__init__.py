"""Triton's kernels for weights of few bits. Nothing here is imported until one is first wanted.

`quantize_4bit` codes and scales of a weight, as `quant.nf4.quantize` · `dequantize_4bit` and back, as `quant.nf4.dequantize`,
the scales' own dequantization in the same kernel · `matmul_4bit` the product by a 4-bit weight, dequantized tile by tile ·
`gemv_4bit` the same for a row or a few, which is generation · `choice` which of them multiplies, by the number of rows ·
`int8_rows` rows of x to INT8, as `quant.int8_linear.DynamicInput` · `int8_matmul` the product of whole numbers, as
`quant.int8_product`.
"""
