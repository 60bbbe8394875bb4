"""Loss functions. The token losses return (sum, count) in float32 or wider; the step divides by the count over micro-batches
and ranks; so do the policy losses, whose count is of tokens or of replies. The preference losses return one number a pair.

cross_entropy   cross-entropy of the next token, the reference implementations: all logits at once
chunked         the same, a few rows of logits at a time; the gradients are computed in the forward
weighted        the same with a weight for each label
kernels/        Triton's part of that on a GPU
choose          the losses by name, and the choice for `--loss auto`

preference              losses of two replies by name: PREFERENCE_LOSSES
preference_registry     what registers them: their details, signature and checks
preference_difference   those of the difference of two log-ratios: DPO and its relatives
preference_free         those without a reference: CPO, SimPO, ORPO
preference_replies      those of each reply by itself: KTO, APO, SPPO, NCA, BCO
preference_sorted       those of a sorted batch: AOT
divergence              f-divergences in the place of the reverse KL
sequence                log-probabilities of whole replies from hidden states and the head's matrix, a chunk at a time
pair_weights            weights of pairs (WPO) and of tokens (LD-DPO)
mixture                 "sigmoid=1,sft=0.2": the losses of a run, and their weights

policy                  losses of sampled replies by name: POLICY_LOSSES (GRPO, DAPO, RLOO and their relatives)
policy_registry         what registers them: their details, ratio, aggregation and checks
advantages              rewards of several functions as one; a reply's reward beside those of its group
kl                      estimates of the KL divergence from a reference at each token: k1, k2, k3
gae, value, kl_control  PPO: rewards, returns and advantages of tokens; the critic's loss; the weight of the KL penalty
entropy                 log-probabilities and entropies of tokens at a temperature, a chunk at a time
sampler                 weights for a sampler whose probabilities differ from the trainer's
overlong                a soft penalty near the limit of a reply's length
"""
