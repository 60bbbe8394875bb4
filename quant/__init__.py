"""Small numbers: weights in 4 bits, optimizer states in 8, and the kernels that compute with them.

`nf4` NF4 and FP4: the two codes, block-wise quantization, packing, double quantization, and back; plain torch · `blockwise`
the 8-bit dynamic map and block-wise quantization to it · `product` the linear map by a 4-bit weight, and its gradient ·
`linear` the layer, and `quantize_linears` · `kernels/` the same in Triton · `folder` a model folder's weights, read and written
so · `bnb_io` bitsandbytes' serialized form · `config` what a command line shows · `report` `plot` sizes and errors · `pages`
new memory, sooner.
"""
