"""Conversations: records of several shapes, chat templates, and which tokens of a rendered conversation are learned.

    sandbox       Jinja in a sandbox, as transformers renders it
    template      chat templates: our own by name, and the folder's
    templates/    our own, as Jinja
"""
