"""Objectives of `--objective`: one file each, named as the objective, whose `TASK` is a `train.task.Task`.

`clm` causal language modelling · `mlm` masked-language modelling · `fim` fill in the middle · `prefix` prefix language
modelling · `span` span corruption · `denoise` denoising · `seq2seq` sequence to sequence · `classify` text classification,
multi-label too · `tag` token classification · `qa` extractive question answering · `pairs` two texts, one label or number ·
`sft` instruction tuning · `dpo` preference pairs (DPO and its relatives) · `kto` rated replies · `reward` a reward model ·
`grpo` `rloo` reinforcement from rewards of sampled replies

A file here, or a file of your own (`--objective PATH.py`), is all that an objective needs: there is no other list of them.
"""
