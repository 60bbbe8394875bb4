"""From a record or a block of tokens to labelled examples: one file a way of making labels.

causal    the next token
masked    masked tokens
seq2seq   a source and a target
labels    the classes of records: their names, sorted into ids
framing   one text or two with the control tokens around them, cut so that these stay
"""
