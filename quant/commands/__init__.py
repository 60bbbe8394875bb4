"""Parts of the command line `python -m quant`, which may import anything.

    options  its options: a dataclass for each scheme, and the options that have no effect without others
"""
