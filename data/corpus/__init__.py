"""From files to clean documents.

ingest   built-in corpora and user's files as documents; long ones cut
dedup    exact and near duplicates
split    training and validation by a hash of the text
"""
