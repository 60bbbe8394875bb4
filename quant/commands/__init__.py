"""Parts of the command line `python -m quant`, which may import anything.

    options  what it asks, a dataclass for each scheme, and which options have an effect beside which
"""
