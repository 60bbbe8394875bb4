"""Reward functions: numbers that judge sampled replies, for objectives of reinforcement learning (--reward).

sample      a reply with its prompt and record: all that a reward function sees
names       an entry of --reward, read: NAME, NAME:VALUE, PATH.py:FUNCTION or a folder
named       the named rewards: exact, answer, number, format, length, length_target, regex, arithmetic, tests
extract     answers in a reply: the last number, <answer> tags, \\boxed{}; the value of an arithmetic expression
user        a function of a user's file: its hash, its import, the call by keyword, errors that name the sample
reward_model  a reward model's folder, by ids of prompt and reply
workers     the processes that run such functions, with a timeout
given       a user's files on resume: named again on the command line, and unchanged
code        code rewards: the code in a reply, the assertions of a record, sandboxes in parallel
sandbox     one bubblewrap sandbox: its mounts, its start, what it reports
harness     the program inside a sandbox
open        all functions of a run, and the matrix of their values
"""
