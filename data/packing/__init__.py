"""From examples, or blocks of tokens, to the rows of a batch. The batch of a step is a pure function of (seed, step).

    blocks         a ring of tokens cut into blocks: rows of one length, without padding; a block may end within a document
    document_blocks    the same of documents that a transform makes anew in each epoch
    segments       pairs of segments, the next one or not, for next-sentence prediction
    first_fit      whole examples side by side in rows of one length: first-fit decreasing
    length_groups  one example a row, beside others of similar length, so that little is padding
    collate        the examples of some rows as a batch of tensors, padded or packed
    examples       records -> examples -> rows -> micro-batches, by first fit or by groups of length
    mixed          the same for several sources, by weight
"""
