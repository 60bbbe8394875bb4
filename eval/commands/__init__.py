"""Parts of the command line `python -m eval`, which may import anything.

    texts   files of texts to score, a batch at a time
"""
