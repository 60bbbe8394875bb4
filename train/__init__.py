"""The loop: batches + network -> checkpoint.

Where to read first: `step` (one optimizer step: the heart, in 40 lines), then `objective` and `loss/` (what is minimised),
`loop` (the run around the steps), and its parts:

    config       what a run is told: the options of `python -m train`
    optim muon sgd   AdamW, Muon and SGD, each beside its plain twin; which weight is trained by which, by its role
    named_optimizer  what they share: one step for plain, sharded and bfloat16 weights, and state that has names
    shard        the part of a tensor that this rank holds, and the whole
    rounding     stochastic rounding to bfloat16
    schedule     the learning rate as a function of the step
    clip         the global gradient norm
    precision    which number format stands where; the scaling of the loss in float16; bfloat16 decided by measurement
    ema          averaged weights beside the raw ones
    tasks/       an objective's batches, its scores beside counting, an example of what was learned: next token, masked token
    evaluate     sums and counts over held-out text; bits per byte, and what counting reaches
    checkpoint   a run's state on disk: whole or absent, never half
    setup        from options to objects: data, network, optimizers, machine
    recompute    less memory: blocks that run again in the backward
    phases rate profiler memory_report   where time and memory go: by phase, beside the machine's rate, by operator, predicted
    log report curves   what a person sees: bar, lines, metrics.jsonl; the words before and after; curves.png
    interrupt    Ctrl-C and SIGTERM
    recipes/     settings in TOML, for `--recipe`

Labels are shifted already: `labels[t]` is the target of position t, and -100 is ignored.
"""
