"""Sememe takes a language model apart. This package imports nothing heavy; import the module you need.

    errors, config, artifact     what everything stands on
    registry                     pinned packages: the embedded models and corpora
    encoded, metrics, kernels    sparse activations, what is measured on them, and how it is made fast
    dictionaries                 one file per architecture and baseline
    text, lm, store, toy, judge  documents, language models, activations on disk, data with a known answer, asking
    formats, foreign, source     other tools' files, and dictionaries brought in from them; streams of activations
    downstream                   one latent taken out at one position, and what follows run again
    harvest, train, fit, evaluate, compare, concepts, geometry, lens, interpret, explain, effects, prompt, intervene,
    trace, pretrain, convert, publish, report    the verbs: each is also `sememe VERB`, a config, a page, a test file
    browse                       the web page and its server
    run, cli                     recipes, and the command line

Example:
    >>> from sememe.train import TrainConfig, train  # doctest: +SKIP
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
