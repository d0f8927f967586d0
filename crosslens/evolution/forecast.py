"""What `evolve` takes with its default analyses, before anything is trained.

Time is counted in operations of a product of matrices, whose speed is measured. Passes over memory are counted by the
operations that a product makes meanwhile (`NANOSECOND`). `benchmarks/forecasts.py` compares the sums with what is
measured. The forecast does not know which features will be alive, and counts all.

Symbols: n held-out tokens, S snapshots, D d_model, F features, k of them active on a token, V tokens of the vocabulary.
"""

from __future__ import annotations

from crosslens.activations.loader import Activations
from crosslens.activations.plan import NANOSECOND, WORKSPACE, Plan, encoding_operations
from crosslens.config import EvolveOptions
from crosslens.crosscoders import CrosscoderTrainingConfig
from crosslens.evolution.dynamics import plan_predictions
from crosslens.evolution.held_out import batch_tokens
from crosslens.evolution.ngrams import count_ngrams
from crosslens.evolution.phases import predicted_tokens
from crosslens.evolution.presence import plan_decodability
from crosslens.evolution.probes import MAX_TOKENS, N_SAMPLES

_ENTRY_BYTES = 44  # of a dense activation while examples and passages are drawn
_FEW = 64  # k of architectures that have none


def plan_evolution(
    acts: Activations, architecture: CrosscoderTrainingConfig, planned: Plan
) -> tuple[int, dict[str, float], int]:
    """Count what `crosslens evolve` needs in one process.

    Args:
        acts: with the tokens.
        architecture: d_sae and the gate.
        planned: the plan of the training.

    Returns:
        Bytes of memory at the peak; operations by what they are for; and tokens that run through whole models, summed
        over snapshots.
    """
    S, D, F, V = acts.n_snapshots, acts.d_model, architecture.d_sae, len(acts.snapshots.tokenizer)
    wide, n_probes, k = S * D, EvolveOptions().n_probes, getattr(architecture, "k", _FEW)
    n, positions = planned.n_held_out, acts.held_out_tokens().numel()
    tokens = predicted_tokens(acts)
    counts = count_ngrams(acts.train_tokens(), acts.snapshots.tokenizer)
    presence, _ = plan_decodability(F, S, D, n)
    predictions, compared = plan_predictions(counts, tokens, acts.snapshots.tokenizer)
    probed = min(MAX_TOKENS, acts.n_tokens)
    operations = {
        # for all that reads held-out tokens, for examples, and for probes
        "encoding": (n + positions + probed) * encoding_operations(F, wide),
        "presence": 4 * n * wide * min(F, n // 2) + 7 * NANOSECOND * n * S * F,
        "agreement": n * S * F * (2 * D + 5 * NANOSECOND),
        "covariances": 4 * 3 * n * S * D**2,  # in float64
        "directions on halves": 2.4 * NANOSECOND * n * k * wide,
        "pairs of features": 2 * 2 * wide * F**2,
        "examples": 100 * NANOSECOND * n * F,
        "logit lens": S * F * V * (2 * D + 10 * NANOSECOND),
        "probes": 40 * NANOSECOND * n_probes * S * N_SAMPLES * D,
        "predictions": S * compared,
    }
    # few features are as rare as to need more than half as many tokens again as the mean one; of those that are read,
    # the tokens are kept on which one of the probed features is active
    read = min(probed, int(1.5 * N_SAMPLES / 2 * F / k))
    gathered = int(read * (1 - (1 - min(1, k / F)) ** n_probes))
    held = max(presence - 8 * wide * F, _ENTRY_BYTES * batch_tokens(F) * F, predictions, 8 * wide * gathered)
    kept = 8 * wide * F + planned.held_out_bytes + planned.whole_bytes
    return planned.process_bytes + kept + held + WORKSPACE, operations, S * tokens.numel()
