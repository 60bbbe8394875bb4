"""Sources of text and records.

    find          files that a path, a folder or a glob names
    files         user's files as documents: .txt .md .py and files of records, plain or .gz
    record_files  records of .jsonl .json .csv .tsv, with their places; `parquet` those of .parquet
    shards        documents -> train.bin, validation.bin, the tokenizer's files, index.json, built once
    records       records as rows of named columns, and which of them are held out
    mixture       the source of each row of a run, by weight (`data.config` reads --corpus NAME=PATH:WEIGHT)
"""
