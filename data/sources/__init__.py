"""Sources of text and records.

    find          files that a path, a folder or a glob names
    files         a user's files as documents or rows: .txt .md .py and files of records, plain or .gz
    record_files  records of .jsonl .json .csv .tsv, with their place in the file
    squad         SQuAD's nested JSON as flat records
    parquet       records of .parquet
    shards        the format of tokenized corpora on disk: train.bin, validation.bin, tokenizer, index.json
    records       records as rows of named columns, and which of them are held out
    mixture       the source of each row of a run, by weight (`data.config` parses --corpus NAME=PATH:WEIGHT)
"""
