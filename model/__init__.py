"""The network and its weights.

Where to read first: `config` (what a network is made of), then bottom up, as a paper would introduce the parts:

    norm · position · rope · mask · linear · attention · cache · mlp · block    the parts
    virtual_tokens · stack · decoder · encoder · encoder_decoder         the bodies
    heads · network                                                      what is read off them, and the whole
    families/ · weights                                                  one table per published family, and how it is read
    init · safetensors_file · finite · hub                               first weights; folders in the Hugging Face layout
    folders · config_json · generation_config · ties                     what stands in such a folder, beside the weights
    decoding · sampling · constraints · stopping · generate · beam · streaming   text out
    fill                                                                 what a masked-language model reads into gaps
    predict                                                              probabilities of classes for many texts
    parameters · flops · training · activations · memory · account       what a network costs, before it is built
    resize                                                               another size of vocabulary
    words                                                                names in messages

and `python -m model` is the command line (`commands/`): generate, fill, predict, info, resize, export.

The legend of shapes. A tensor's name ends in the letters of its axes, in order, and they mean the same in every file:

    B batch             T query positions     S key positions     N tokens, flattened
    D model width       H query heads         G key/value heads   K head width
    F feed-forward      V vocabulary          R adapter rank      L layers          E experts
    O, I   a weight's out and in features

so `q_BHTK @ k_BHSK.mT` is `score_BHTS`. A letter that is absent is an axis that is not there; `1` is an axis of size one.
"""
