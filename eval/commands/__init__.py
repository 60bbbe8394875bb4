"""Parts of the command line `python -m eval`, which may import anything.

    options  what it asks, and which options have an effect beside which
    texts    files of texts to score, a batch at a time
"""
