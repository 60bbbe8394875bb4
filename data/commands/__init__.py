"""Commands of `python -m data`.

    task  labelled data sets from the standard library, as files
"""
