"""A recipe as it is written: its tables, and the stages they stand for. Runs nothing.

A recipe is a TOML file with a `name`, the shared tables `[model]`, `[text]` and `[policy]`, and one table per
stage: `[pretrain]`, `[harvest]`, `[train]`, `[fit]`, `[evaluate]`, `[interpret]`, `[prompts]`, `[effects]`,
`[explain]`, `[export]`, `[compare]`, `[geometry]`, `[toy]`, `[grid]`, `[publish]`, `[expected]`, and any verb about
finished dictionaries (`[concepts]`). A stage's table holds its verb's options; where it reads and writes follows from
the name:

    artifacts/NAME/{model, toy, grid, store, dictionary, baseline, report, atlas, prompts, effects, explanations,
                    site, comparison, geometry, concepts, release, results}

`[scale.SCALE]` tables hold what is otherwise at that scale; the result of a recipe with scales lies in
artifacts/NAME/SCALE.

Several dictionaries are `[train.NAME]` tables with an architecture each, or come from a `[train.sweep]`; their
results lie one folder deeper: `dictionary/NAME`, `report/NAME`. `[fit.NAME]` tables, with a baseline each, add
baselines and sparse coders in `baseline/NAME`. A `[twin]` table with `of = "NAME"` harvests and trains that dictionary
once more on the model with its weights shuffled, in `twin/store` and `twin/NAME`: a null beside
all numbers. With a `[compare]` table all of them are compared at the end, and
`[evaluate]`, `[interpret]` and `[export]` happen only where their tables are there.

Of `[harvest]`, `[compare]`, `[geometry]`, `[toy]`, `[grid]` and of the verbs about one dictionary there may be several,
named likewise. `[evaluate]` and `[interpret]` may name which of the `dictionaries` they are about (effects,
explanations and pages are of those interpreted; `[effects]` may name fewer of them), and `[interpret]` dictionaries of
the recipe `against` which to look for near latents.

    tables.py   the file: its tables, scales, names
    stages.py   the stages they stand for, each with its verb's config
    asked.py    stages that ask something of finished dictionaries
"""

from sememe.recipe.stages import Stage, place_of, stages
from sememe.recipe.tables import TWIN, Recipe, read_recipe

__all__ = ["TWIN", "Recipe", "Stage", "place_of", "read_recipe", "stages"]
