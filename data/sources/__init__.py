"""Where examples come from.

    records     records of files, as rows of named columns; and which of them are held out
    mixture     several sources by weight
"""
