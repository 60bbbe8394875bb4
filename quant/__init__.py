"""Small numbers: NF4, FP4, INT8 and their kernels. Nothing is here yet."""
