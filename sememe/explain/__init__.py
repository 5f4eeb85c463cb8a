"""The verb that says in words what each latent stands for, and how well the words hold.

For every latent a rule over tokens, without a language model; for chosen ones what a language model says of their
examples. Words are found on some documents of the atlas and scored on the others, by rules' own scores and by
scorers; atlases of nulls are explained and scored alike. Knows atlases; of models only to ask them, and to run
texts that were written for a latent. The atlas is not changed.

    config.py      the options
    examples.py    one reading of an atlas for all paths, split by document
    lexical/       rules over tokens
    prompts.py     how tokens and activations are written in prompts, how answers are read
    explainers.py  what is asked so that a latent is explained
    scorers/       how words are scored, a file each
    asked.py       a judge asked about many latents
    written.py     texts that were written for latents, run through the model
    rehearsal.py   what a run would ask and cost
    results.py     means, intervals, lifts over nulls, rank correlations
    tables.py      what was found, a row per latent and per cluster
    verb.py        all of it together
"""

from sememe.explain.config import ExplainConfig, LexicalConfig
from sememe.explain.examples import side_of
from sememe.explain.verb import Explanations, explain, preview

__all__ = ["ExplainConfig", "Explanations", "LexicalConfig", "explain", "preview", "side_of"]
