"""What is measured, as sums that stream. Knows no language model and no dictionary: tensors in, numbers out.

Every metric is a ratio of sums over rows (tokens). Sums are kept in float64 per *unit* of a bootstrap (a
document) and divided once at the end, so that a value does not depend on how the rows were cut into batches,
and so that a confidence interval over documents costs nothing more than the sums. Rows that a mask leaves out
are not read at all: NaN there changes nothing. NaN elsewhere comes out as NaN, with its cause.

    fvu                 sum |x - recon|^2 / sum |x - mean|^2, the mean being that of the same rows
    explained_variance  1 - fvu
    mse                 mean over rows and d_out of (x - recon)^2;  rmse its square root
    cosine              mean over rows of cos(x, recon); 0 where either is the zero vector
    l0, l1              mean over rows of the number of non-zero acts, and of the sum of their absolute values
    density             per latent, the share of rows on which it is active;  frac_alive: the share of
                        latents that are active on at least one row
    ce_increase         CE(arm) - CE(base), means over predictions, in nats
    ce_recovered_zero   (CE(zero) - CE(arm)) / (CE(zero) - CE(base)): 1 is as good as unedited, 0 as zeros
    ce_recovered_mean   the same with mean ablation
    kl                  mean over predictions of KL(base || arm), in nats
    perplexity          exp(CE(arm))
    mcs, mmcs           the largest cosine of each direction with another dictionary's; the mean of those
    mmacs               the same with absolute cosines
    capacity            (w . w)^2 / sum_j (w . w_j)^2: how much of a dimension a latent has to itself

`matching` has what is asked of two dictionaries, or of one and its checkpoints (one-to-one matches, stability,
splitting, the rare cluster, cheats); `geometry` where a dictionary's directions lie.
"""

from __future__ import annotations

from sememe.metrics.concepts import (
    Absorption,
    SpuriousRemoval,
    TargetedPerturbation,
    Tested,
    absorption,
    class_probes,
    concept_probe,
    over_halvings,
    spurious_removal,
    targeted_perturbation,
)
from sememe.metrics.cuts import numbered_units, shuffled_labels
from sememe.metrics.directions import Nearest, check_finite, mcs, mmcs, nearest_directions, unit_rows
from sememe.metrics.geometry import (
    Correlations,
    Moments,
    NeuronSparsity,
    RandomBaseline,
    capacity,
    correlations,
    effective_neurons,
    encoder_decoder_cosine,
    moments,
    neuron_sparsity,
    null_space_share,
    outlier_dimensions,
    probe_rank,
    random_moments,
    random_rows,
    token_match,
)
from sememe.metrics.matching import (
    Cheats,
    Match,
    RareCluster,
    Splits,
    Stability,
    cheats,
    coincide,
    larger_dictionary_test,
    match,
    mean_directions,
    mmacs,
    opposites,
    rare_cluster,
    self_similarity,
    splits,
)
from sememe.metrics.predictions import (
    BaseTerms,
    LanguageModelLoss,
    PredictionTerms,
    base_terms,
    prediction_terms,
)
from sememe.metrics.probing import (
    LinearProbe,
    Probe,
    ProbeScores,
    class_scores,
    dense_probe,
    linear_probe,
    probe_scores,
    sparse_probe,
)
from sememe.metrics.reconstruction import Reconstruction
from sememe.metrics.sparsity import DensityHistogram, Sparsity, density_histogram
from sememe.metrics.sums import Statistic, Sums, bootstrap, over_latents, over_pairs

__all__ = [
    "Absorption",
    "BaseTerms",
    "Cheats",
    "Correlations",
    "DensityHistogram",
    "LanguageModelLoss",
    "LinearProbe",
    "Match",
    "Moments",
    "Nearest",
    "NeuronSparsity",
    "PredictionTerms",
    "Probe",
    "ProbeScores",
    "RandomBaseline",
    "RareCluster",
    "Reconstruction",
    "Sparsity",
    "Splits",
    "SpuriousRemoval",
    "Stability",
    "Statistic",
    "Sums",
    "TargetedPerturbation",
    "Tested",
    "absorption",
    "base_terms",
    "bootstrap",
    "capacity",
    "cheats",
    "check_finite",
    "class_probes",
    "class_scores",
    "coincide",
    "concept_probe",
    "correlations",
    "dense_probe",
    "density_histogram",
    "effective_neurons",
    "encoder_decoder_cosine",
    "larger_dictionary_test",
    "linear_probe",
    "match",
    "mcs",
    "mean_directions",
    "mmacs",
    "mmcs",
    "moments",
    "nearest_directions",
    "neuron_sparsity",
    "null_space_share",
    "numbered_units",
    "opposites",
    "outlier_dimensions",
    "over_halvings",
    "over_latents",
    "over_pairs",
    "prediction_terms",
    "probe_rank",
    "probe_scores",
    "random_moments",
    "random_rows",
    "rare_cluster",
    "self_similarity",
    "shuffled_labels",
    "sparse_probe",
    "splits",
    "spurious_removal",
    "targeted_perturbation",
    "token_match",
    "unit_rows",
]
