"""One interface to all tokenizers.

base             the interface, and the choice of a tokenizer's kind by the files of a folder
sentencepiece    SentencePiece models: ours, lossless on any text, and others
tokenizer_json   tokenizer.json and vocab.txt, by the library `tokenizers`
export           ours as tokenizer.json
training         our SentencePiece BPE, trained on all of a text
"""
