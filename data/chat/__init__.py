"""Conversations: records of several shapes, chat templates, and which tokens of a rendered conversation are learned.

    conversation  messages with their tools, as templates read them; strings without a template
    turns         turns of a record as messages: roles, contents, tool calls, reasoning, flags
    shapes        records of Alpaca, ShareGPT, OpenAI, prompt/completion and text, told apart by their columns
    sandbox       Jinja in a sandbox, as transformers renders it
    template      chat templates: our own by name, and the folder's
    templates/    our own, as Jinja
    guard         control tokens that are written in contents stay text
    encode        a rendering as ids, and which of them are learned: `encode_chat`, `ChatEncoder`
    overlong      conversations that are longer than a row
    variables     further variables of templates, as options give them
    preview       the text of an example with its learned tokens marked

    preferences        records of pairs (prompt, chosen, rejected) and of rated replies: `read_preference`, `read_rated`
    replies            records of one reply or several to a prompt, to be scored: `read_prompt_replies`
    prompts            prompts for reinforcement, and the columns for rewards: `read_prompt`
    encode_preference  replies to one prompt as ids, behind the same ids of the prompt, and what does not fit: `encode_replies`
    rankings           pairs of replies from scores, rankings and votes
"""
