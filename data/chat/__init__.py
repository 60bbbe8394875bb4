"""Conversations: records of several shapes, chat templates, and which tokens of a rendered conversation are learned."""
