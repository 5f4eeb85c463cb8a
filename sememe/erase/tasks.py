"""Sentences that end before a pronoun, whose subject says which: for any tokenizer. Knows no model.

Cunningham et al. 2023 (arXiv:2309.08600, version 1) erase the gender that a model has read off a name, and see whether
it still predicts the pronoun. Differs: names, sentences and occupations are our own; a name's sentences are all chosen
on or all held out, so that a probe must know the gender and not the name.
"""

from __future__ import annotations

from typing import Literal

from sememe.labelled import Labelled, LabelledConfig, choose

__all__ = ["ANSWERS", "read_task"]

ANSWERS = {"he": " he", "she": " she"}
"""What follows, by label."""

NAMES = {
    "he": (
        "James John Robert Michael William David Richard Joseph Thomas Charles Daniel Matthew Anthony Mark Donald "
        "Steven Paul Andrew George Kenneth Edward Brian Ronald Kevin Jason Jeffrey Frank Scott Eric Stephen Peter "
        "Henry Walter Patrick Jack Dennis Harold Douglas Carl Arthur Roger Albert Adam Ralph Bruce Louis Philip Simon "
        "Oliver Martin"
    ),
    "she": (
        "Mary Patricia Jennifer Linda Elizabeth Barbara Susan Jessica Sarah Karen Nancy Lisa Margaret Betty Sandra "
        "Ashley Dorothy Emily Donna Michelle Carol Amanda Melissa Deborah Stephanie Rebecca Laura Helen Sharon Cynthia "
        "Amy Anna Angela Ruth Brenda Pamela Nicole Catherine Virginia Christine Maria Diane Julia Joan Alice Rachel "
        "Janet Julie Grace Rose"
    ),
}
OCCUPATIONS = {
    "he": (
        "carpenter,mechanic,construction worker,labourer,truck driver,sheriff,mover,software developer,farmer,guard,"
        "chief,janitor,lawyer,engineer,physician,chief executive,plumber,electrician,soldier,salesman"
    ),
    "she": (
        "nurse,secretary,receptionist,hairdresser,librarian,housekeeper,cashier,school teacher,counsellor,midwife,"
        "assistant,flight attendant,seamstress,cleaner,babysitter,maid,ballet dancer,dietician,social worker,typist"
    ),
}
"""By the stereotype, mostly those of Zhao et al. 2018 (WinoBias, arXiv:1804.06876)."""

SENTENCES = (
    "Last night {who} went home early because",
    "After the meeting, {who} said that",
    "When {who} woke up that morning,",
    "As so often {who} was late again, and",
    "In the end {who} closed the book, and then",
    "By noon {who} was tired, so",
    "Everyone knew {who}, and everyone knew that",
    "For a while {who} looked out of the window, and then",
)
"""The subject never stands first: a row's first position is an attention sink, which is not edited."""


def read_task(config: LabelledConfig, task: Literal["names", "occupations"]) -> Labelled:
    """Every sentence with every subject, labelled by its pronoun; grouped by subject."""
    texts, labels, groups = [], [], []
    for label in ANSWERS:
        found = NAMES[label].split() if task == "names" else OCCUPATIONS[label].split(",")
        for subject in found:
            who = subject if task == "names" else f"the {subject}"
            for sentence in SENTENCES:
                texts.append(sentence.format(who=who))
                labels.append(label)
                groups.append(subject)
    return choose(config, texts, labels, groups)
