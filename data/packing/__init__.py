"""How examples become rows of a batch.

    blocks      a ring of tokens cut into blocks: rows of one length, without padding, documents cut where a block ends
    first_fit   whole examples side by side in rows of one length: first-fit decreasing
    pad         an example a row, beside others of about its length
    plan        which units stand in which row of which step
    collate     the examples of some rows as a batch of tensors
    examples    records -> examples -> rows -> micro-batches, by one of the two packings of examples
    mixed       the same of several sources, by weight
"""
