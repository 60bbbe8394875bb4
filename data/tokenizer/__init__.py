"""One interface to all tokenizers.

    base            the interface `Tokenizer`
    open            load_tokenizer: the class is chosen by the files of a folder
    sentencepiece   SentencePiece models: our own (lossless on any text) and published ones
    tokenizer_json  tokenizer.json and vocab.txt, run by the library `tokenizers`
    export          our SentencePiece models as tokenizer.json, for transformers
    training        trains our SentencePiece BPE on a corpus
"""
