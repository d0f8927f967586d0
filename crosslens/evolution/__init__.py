"""When features appear, change and disappear over the snapshots.

In: a crosscoder, and held-out activations for most measures. Out: tables with a row per feature, or per feature and
snapshot.

Start with `history.evolve`, which encodes the held-out activations once (`held_out`) for all analyses. Then by
question: `firing` (how often features fire), `presence` (what each snapshot knows of a feature), `lifecycles` (origin,
birth, fate by any measure of presence), `births` (births, their uncertainty and controls), `concepts` (when the concept
of a task is readable, on paired prompts), `geometry` (rotation and dimensionality), `splitting` (splits, mergers,
replacements), `controls` (encoder share, latent scaling), `probes`, `ngrams`, `dynamics` and `phases` (predictions of
the models over training), `agreement` and `seeds` (is it the same feature?), `selection` (which snapshots to use).
`measures` has the decorator by which another measure joins the pass.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
