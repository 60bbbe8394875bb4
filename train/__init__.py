"""The loop: batches + network -> checkpoint.

Where to read first: `step` (one optimizer step: the heart, in 40 lines), then `objective` and `loss/` (what is minimised),
`loop` (the run around the steps), and its parts:

    config       what a run is told: the options of `python -m train`
    optim muon   AdamW and Muon, each beside its plain twin; which weight is trained by which, by its role
    schedule     the learning rate as a function of the step
    clip         the global gradient norm
    precision    float32 or bfloat16, decided by measurement
    tasks/       an objective's batches, its scores beside counting, an example of what was learned: next token, masked token
    evaluate     sums and counts over held-out text; bits per byte, and what counting reaches
    checkpoint   a run's state on disk: whole or absent, never half
    setup        from options to objects: data, network, optimizers, machine
    log report curves   what a person sees: bar, lines, metrics.jsonl; the words before and after; curves.png
    interrupt    Ctrl-C and SIGTERM
    recipes/     settings in TOML, for `--recipe`

Labels are shifted already: `labels[t]` is the target of position t, and -100 is ignored.
"""
