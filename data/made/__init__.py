"""Labelled data sets made from the sources of Python's standard library, and tasks with computed answers.

`python -m data task NAME` writes them.

    modules        modules by their syntax trees: definitions with docstrings; which modules are held out; draws
    names          kinds of names by the syntax trees: module, function, class or constant
    text           docstrings as plain text, paragraphs and sentences
    tag            names in documentation sentences, IOB2
    qa             questions about a docstring; the answer is a span of it, a third have none
    pairs          do two halves of docstrings belong together
    scores         how similar are two functions: the Jaccard index of their identifiers
    conversations  several turns about a short context, with a system message
    snippets       their contexts: definitions in a few lines, and the questions that they answer
    preferences    pairs of replies that keep and break a rule; conversations in both styles
    rule           the rule: short, no hedge, names the module; whether a reply is well formed
    styles         surface forms of replies that keep or break it
    verifiable     sort digits, count a letter, add numbers, reverse a word, close brackets: no sources are read
    sets           training and held-out records of each set from the library, measured and checked
    written        a set as the command writes it: records, and what is printed about them
    cues           how well a label could be guessed by a length or position alone
"""
