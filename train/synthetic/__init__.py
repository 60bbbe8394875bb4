"""Data that a network writes itself, and the best of its replies.

self_instruct  new instructions from seeds, round by round: examples, lists, filters, replies
settings       its options
examples       examples of a request; a list of instructions in a completion
filters        reasons to reject an instruction by its text
novelty        reasons to reject it for its likeness to others: equal, or ROUGE-L above a threshold
rounds         the file of finished rounds, by which a killed command goes on
report         its files and figures; advice where it is stuck
writer         lists and replies by a network, as text or by its chat template
best_of        the best of n replies: the choice, the distribution of the winner, its KL divergence from the policy
samples        n replies to each prompt of a file, their rewards, and the winners as records
"""
