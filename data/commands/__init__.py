"""Commands of `python -m data`.

    task     labelled data sets from the standard library, as files
    preview  which tokens of conversations are learned
    pairs    pairs of replies from scores, rankings and votes
"""
