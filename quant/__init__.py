"""Small numbers: weights in 4 and 8 bits, inputs and optimizer states in 8, and the kernels that compute with them.

4 bits  `nf4` NF4 and FP4: codes, block-wise quantization, packing, double quantization, and back; plain torch · `blockwise` the
        8-bit dynamic map and block-wise quantization to it · `product` the linear map by a 4-bit weight, and its gradient
8 bits  `int8` whole numbers in equal steps, symmetric or affine · `int8_product` sums of their products, and what they stand
        for · `int8_linear` the layer, with inputs scaled as they come or before · `llm_int8` outliers apart · `observe` ranges
        of inputs · `calibrate` a network's · `fake` roundings with gradients · `qat` layers that learn to be rounded
both    `layer` the 4-bit layer, of which others are kinds · `linear` `quantize_linears`, and a table of schemes · `folder` a
        model folder's layers, read and written · `forms` as what: `bnb_io` `bnb_8bit` bitsandbytes' tensors, `compressed` those
        of compressed-tensors · `kernels/` the same in Triton · `config` `commands` what a command line shows · `report` `plot`
        sizes and errors · `formats` modules that `.to(dtype)` leaves alone · `pages` new memory, sooner
"""
