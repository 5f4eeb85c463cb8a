"""The verb that trains dictionaries. Takes any source of activations; knows nothing about language models
beyond handing their names on (training straight from one is set up in `source.py`).

    config.py    the options
    schedule.py  how many steps, and the learning rate of each
    member.py    one dictionary in training: a step, its state
    dead.py      what is done about latents that no longer fire
    run.py       the loop: members on one source, their logs and checkpoints
    verb.py      from a config to finished artifacts

Killed at any moment and started again, a run goes on from its last checkpoint with the same bits.
"""

from sememe.train.config import TrainConfig, learning_rate
from sememe.train.verb import train

__all__ = ["TrainConfig", "learning_rate", "train"]
