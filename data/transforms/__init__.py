"""From a record or a block of tokens to labelled examples: one file for each way of making labels.

    causal    causal language modelling: the next token
    masked    masked language modelling, of tokens or whole words
    next_sentence  pairs of segments with special tokens, masked
    words     which tokens belong to one word
    fim       fill in the middle: prefix, suffix and middle in another order, by published formats
    prefix    prefix language modelling: a bidirectional prefix, labels for the rest
    seq2seq   source and target of an encoder-decoder
    span      span corruption, T5's: spans of the text become sentinels
    denoise   BART's noise: sentences permuted, spans masked, tokens inserted, the text rotated
    denoisers, fill_spans         numbers of span corruption, and UL2's mixture; a source with its spans put back
    row_random, teacher_forcing   random numbers of a row; batches of an encoder-decoder from pairs of token arrays
    labels    class labels of records, and their ids
    tags      a label for each word, on the word's first token
    answers   answers in a context: windows, labels of start and end
    framing   special tokens and token types around one text or two, and truncation
"""
