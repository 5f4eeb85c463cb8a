"""The verb that asks where latents lie: in the neuron basis, to one another, to other dictionaries', over training.

    config.py    what can be chosen
    latents.py   one dictionary: a number for each latent, its mean, and what random directions have
    rare.py      one: the latents that hardly fire, and whether they are one direction
    between.py   several: who has whose latents, one to one and at best; splitting; the rare direction across seeds
    history.py   one dictionary's kept checkpoints: which latents settled, which were lost again
    verb.py      opens, asks, writes

Knows weights, and rows of a store where densities are asked for; runs no language model (of one it reads embeddings).
"""

from sememe.geometry.config import GeometryConfig
from sememe.geometry.verb import GEOMETRY, geometry

__all__ = ["GEOMETRY", "GeometryConfig", "geometry"]
