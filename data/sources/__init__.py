"""Where examples come from.

    records     records of files, as rows of named columns; and which of them are held out
    mixture     which source each row of a run comes from, by weight (`data.config` reads --corpus NAME=PATH:WEIGHT)
"""
