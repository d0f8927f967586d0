"""How Bayazit et al. (arXiv 2509.05291, "Crosscoding Through Time") estimate effects: as written, and as released.

Their paper describes integrated gradients with ten nodes from the clean run towards zero. In their released code, with
the versions that it pins, every node gets the logits of the first, so that all gradients are taken at the clean run.
That is attribution patching. Both recipes have their threshold: an effect at one token counts only above .1 logits.

    runs = PromptRuns(crosscoder, snapshots, task, paired=False, prepend_bos=False)  # they add no BOS
    ie = attribute(runs, recipes.released())
    share = relie(ie, min_effect=0)                                       # and leave out no small effect

Effects are here summed over the positions of a prompt and averaged over prompts. Their code averages over all positions
of a batch, padding included, which divides all effects of a batch by its length; RelIE is the same if the prompts have
one length. A feature without any effect is NaN, and undefined in `classify`, where they set .5 and call it shared.
"""

from __future__ import annotations

from crosslens.causal.attribution import Estimator

THRESHOLD = 0.1  # logits, at one token


def paper() -> Estimator:
    """The estimator of the paper: integrated gradients at alpha = 1, .9, ..., .1, baseline and error node at zero."""
    return Estimator("ig", rule="left", n_nodes=10, baseline="zero", error="joint", threshold=THRESHOLD)


def released() -> Estimator:
    """The estimator of the released code: the gradient at the clean run, times the features."""
    return Estimator("gradient", baseline="zero", error="joint", threshold=THRESHOLD)
