"""The verb that looks at one text through a dictionary: what fires where, how strongly, and what each does there.

One forward gives the activations; for every latent that is shown the model is run on from its token without it. Knows
a dictionary and its model, and an atlas if one is given; the forwards are `downstream`'s.

    config.py   the options
    verb.py     one text
    chosen.py   some twenty of them at once, for a site
    view.py     the result: its rows, a table for the terminal, a page
"""

from sememe.prompt.chosen import CHOSEN, prompts
from sememe.prompt.config import PromptConfig, PromptsConfig
from sememe.prompt.verb import Known, prompt
from sememe.prompt.view import LatentRow, OutputToken, PromptView, TokenRow, print_prompt

__all__ = [
    "CHOSEN",
    "Known",
    "LatentRow",
    "OutputToken",
    "PromptConfig",
    "PromptView",
    "PromptsConfig",
    "TokenRow",
    "print_prompt",
    "prompt",
    "prompts",
]
