"""The loop: batches + network -> checkpoint.

Where to read first: `step` (one optimizer step: the heart, in 40 lines), then `objective` and `loss/` (what is minimised),
`engine` (what a step trains, and its state on disk), `loop` (the run around the steps; `start` begins it), and their parts:

    config       what a run is told: the options of `python -m train`; `needs`: which of them ask for others
    command_line what all command lines share: messages, notes, options that would do nothing
    overrides    what a resume may be told
    distributed  ranks, and how they share a network: DDP, FSDP2
    optim adamw8bit muon sgd   AdamW, also with moments of 8 bits, Muon and SGD, each beside its plain twin; which weight goes
                 to which, by its role
    named_optimizer  what they share: one step for plain, sharded and bfloat16 weights, and state that has names
    shard        the part of a tensor that this rank holds, and the whole
    rounding     stochastic rounding to bfloat16
    schedule     the learning rate as a function of the step
    clip         the global gradient norm
    precision    which number format stands where; the scaling of the loss in float16; what `auto` is
    ema          averaged weights beside the raw ones
    tasks/       one file an objective: its batches, its scores beside counting, an example of what was learned
    task registry   what a run asks of one; which there are, ours and a user's own files
    token_task   what objectives on blocks of plain text share
    record_task  what objectives on records with columns share
    label_objective label_scores   the loss of classified texts; their scores, and those of a guess that ignores the text
    evaluate     sums and counts over held-out text; bits per byte, and what counting reaches
    scoring held_out   a model folder as scores want it; scored on text as training validates
    freeze       weights that stay as they are, by their names
    adapters qat runs that train an adapter beside frozen weights; weights that learn to be whole numbers
    checkpoint   a run's state on disk: whole or absent, never half
    sharded_checkpoint   tensors of which each rank holds a part: one file a part, read on any number of ranks
    export       a checkpoint, in parts or not, as one model folder
    lock         one live run a folder
    setup        from options to objects: data, network, optimizers, machine
    recompute    less memory: blocks that run again in the backward
    allocator    memory that a step frees is kept for the next
    phases rate profiler memory_report watch   where time and memory go: by phase, operator, beside what is predicted
    log report curves   what a person sees: bar, lines, metrics.jsonl; the words before and after; curves.png
    interrupt    Ctrl-C and SIGTERM
    recipes/     settings in TOML, for `--recipe`

Labels are shifted already: `labels[t]` is the target of position t, and -100 is ignored.
"""
