"""The verb that asks what latents know of labels: probes on few of them, ablations that probes feel, absorption.

labelled/ (texts, their labels, rows of them) -> metrics/ -> verb.py (the report)
"""

from sememe.concepts.config import ConceptsConfig
from sememe.concepts.verb import CONCEPTS, concepts

__all__ = ["CONCEPTS", "ConceptsConfig", "concepts"]
