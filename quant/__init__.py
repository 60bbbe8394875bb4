"""Low-precision numbers: weights in 4 and 8 bits, inputs and optimizer states in 8, and Triton kernels that compute with them.

    config             settings of every scheme: FourBit, Int8, QatConfig (no torch)

4 bits
    nf4                NF4 and FP4: codebooks, block-wise quantization, packing, double quantization, and back; plain torch
    dequantize         the same back, fast: in chunks on a CPU, by Triton on a GPU
    blockwise          block-wise 8-bit quantization with the dynamic map
    packed             the tensors of a 4-bit weight, as kernels and products read them
    product            y = x Wᵀ + b by a 4-bit weight, and the gradient of x
    layer              `QuantizedLinear`, the 4-bit linear layer; base class of the other quantized layers

8 bits
    int8               integers in equal steps, symmetric or affine, per tensor, channel or group
    int8_product       products of INT8 codes
    int8_linear        the INT8 layer, with inputs scaled dynamically or statically
    llm_int8           LLM.int8(): outlier columns in floating point
    calibrate          static scales of a network's inputs
    observe, histogram observers of an input's range; the search of the histogram observer
    fake, qat          fake quantization with gradients; layers in quantization-aware training

networks and folders
    linear             `quantize_linears` and what it finds in a network
    folder             quantized layers of a model folder, in and out
    forms              registry of the forms in which folders store them, one file `*_io.py` each:
    bnb_io, bnb_8bit_io, compressed_io    bitsandbytes in 4 bits, LLM.int8(), compressed-tensors
    report, plot, __main__, commands/     `python -m quant`: sizes, errors, perplexity; its options

    kernels/           the same computations in Triton
    formats, pages     a module whose tensors keep their dtype; huge pages for new memory
"""

from importlib import import_module

PUBLIC = {  # file: the names that it offers; `from quant import quantize_linears` is the stable interface
    "blockwise": ("dequantize_8bit", "dynamic_map", "quantize_8bit"),
    "calibrate": ("observe_inputs",),
    "config": ("FourBit", "Int8", "QatConfig", "QuantError"),
    "fake": ("fake_quantize",),
    "int8": ("Codes", "Grid", "Int8Tensor", "quantize_int8", "scales_for", "to_codes"),
    "int8_linear": ("DynamicInput", "Int8Linear", "StaticInput"),
    "int8_product": ("int8_product_reference", "multiply_int8"),
    "layer": ("QuantizedLinear",),
    "linear": ("dense_weight", "quantizable_layers", "quantize_linears", "quantized_layers"),
    "llm_int8": ("LlmInt8Linear", "LlmInt8Tensor", "quantize_llm_int8"),
    "nf4": (
        "QuantizedTensor",
        "dequantize_4bit",
        "fp4_codebook",
        "nf4_codebook",
        "pack",
        "quantize_4bit",
        "quantize_reference",
        "unpack",
    ),
    "observe": ("Histogram", "MinMax", "MovingAverage", "Mse", "Observer", "Percentile"),
    "product": ("linear_4bit",),
    "qat": ("QatLinear", "convert_qat", "prepare_qat", "qat_layers"),
}
_FILE_OF = {name: file for file, names in PUBLIC.items() for name in names}
__all__ = sorted(_FILE_OF)


def __getattr__(name: str):
    if name in _FILE_OF:
        return getattr(import_module(f"{__name__}.{_FILE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
