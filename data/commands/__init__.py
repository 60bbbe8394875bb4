"""Commands of `python -m data`.

    task     labelled data sets from the standard library, as files
    preview  which tokens of conversations are learned
    pairs    pairs of replies from scores, rankings and votes
    self_instruct    instructions and replies that a network writes itself
    best_replies     the best of n replies to each prompt (`replies`)
    writing_network  shared by these two: the network that writes, with its template and stop ids
"""
