"""Objectives of `--objective`: one file each, of the name that is asked for, whose `TASK` is a `train.task.Task`.

`clm` the next token · `mlm` the masked token · `seq2seq` a text from another · `classify` the label of a text, or several

A file here, or a file of your own (`--objective PATH.py`), is all that an objective needs: nowhere else is a list of them.
"""
