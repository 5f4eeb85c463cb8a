"""The verb that trains dictionaries. Takes any source of activations; knows nothing about language models
beyond handing their names on (training straight from one is set up in `source`).

    config.py    the options
    schedule.py  how many steps, and the learning rate of each
    member.py    one dictionary in training: a step, its state
    by_site.py   what is logged of each of several outputs
    objective.py what a dictionary is trained for
    dead.py      latents that are pointed anew
    snapshots.py copies of the dictionary as it was; latents that no longer change
    feed.py      batches on their way to a device
    crew.py      the dictionaries of a run, side by side in one process
    workers.py   the same on several devices, in a process for each
    watch.py     what is measured on rows that are never trained on
    run.py       the loop: a team on one source, its logs and checkpoints
    sweep.py     which dictionaries a sweep is made of, and their folder
    verb.py      from a config to finished artifacts

Killed at any moment and started again, a run goes on from its last checkpoint with the same bits.
"""

from sememe.train.config import TrainConfig, learning_rate
from sememe.train.sweep import Sweep, Swept, open_sweep, swept_names, variants
from sememe.train.verb import train, train_sweep
from sememe.train.watch import Probe

__all__ = [
    "Probe",
    "Sweep",
    "Swept",
    "TrainConfig",
    "learning_rate",
    "open_sweep",
    "swept_names",
    "train",
    "train_sweep",
    "variants",
]
