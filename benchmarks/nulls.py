"""What readings of evolution give where what they claim is false, on the demo's crosscoder that comes with the package.

    copies   every snapshot twice: between copies nothing turns, nothing is born, and effects are equal; and the same
             with noise in every copy, a tenth of the variance, without which both angles would be equal
    orders   the snapshots in random orders: no more splits and mergers than chance gives

    python benchmarks/nulls.py [--orders 40]

Each copy of a decoder row has an error of its own, a twentieth of its length, so that rotation cannot be told by equal
rows; the encoder reads the two copies as it read the one, so that features are the same. A minute on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import crosslens as cl
from crosslens.crosscoders import Crosscoder
from crosslens.evolution.births import presence_curves
from crosslens.evolution.firing import measure_firing
from crosslens.evolution.geometry import half_cosines, rotation_per_interval
from crosslens.evolution.lifecycles import PRESENCE, birth_index
from crosslens.evolution.presence import measure_decodability
from crosslens.evolution.splitting import split_counts
from crosslens.synthetic import grammar

HOOK = "blocks.1.hook_resid_post"
ERROR, NOISE = 0.05, 0.1


class Chosen(cl.Activations):
    """The held-out activations of another object at given snapshots, any number of times each, with noise."""

    def __init__(self, acts: cl.Activations, places: list[int], noise: float) -> None:
        self.acts, self.places = acts, places
        deviation = torch.cat(list(acts.held_out())).std(0)[places]
        self.size = noise**0.5 * deviation

    @property
    def n_snapshots(self) -> int:
        return len(self.places)

    def held_out(self, batch_size: int = 4096) -> Iterator[Tensor]:
        drawn = torch.Generator().manual_seed(0)  # the same noise in every pass
        for x in self.acts.held_out(batch_size):
            copies = x[:, self.places]
            yield copies + self.size * torch.randn(copies.shape, generator=drawn)

    def held_out_tokens(self) -> Tensor:
        return self.acts.held_out_tokens()

    def keep(self, tokens: Tensor) -> Tensor:
        return self.acts.keep(tokens)


def at(cc: Crosscoder, places: list[int], error: float = 0.0) -> Crosscoder:
    """The crosscoder of given snapshots, with the same features: one that occurs n times is read n times weaker."""
    S, D, F = len(places), cc.d_model, cc.cfg.d_sae
    times = torch.tensor([places.count(s) for s in places])
    config = type(cc.cfg).from_dict({**cc.cfg.to_dict(), "d_in": S * D, "n_snapshots": S, "metadata": {}})
    found = type(cc)(config)
    state = {name: value.detach().clone() for name, value in cc.state_dict().items()}
    rows = cc.W_dec.detach().view(F, -1, D)[:, places]
    rows = rows + error * rows.norm(dim=-1, keepdim=True) * torch.randn(rows.shape) / D**0.5
    state["W_dec"] = rows.flatten(1)
    state["W_enc"] = (cc.W_enc.detach().view(-1, D, F)[places] / times[:, None, None]).flatten(0, 1)
    state["b_dec"] = cc.b_dec.detach().view(-1, D)[places].flatten()
    state["activation_scale"] = cc.activation_scale[places]
    found.load_state_dict(state)
    return found.requires_grad_(False)


def print_copies(cc: Crosscoder, acts: cl.Activations, noise: float) -> None:
    places = [s for s in range(cc.n_snapshots) for _ in range(2)]
    twice, given = at(cc, places, ERROR), Chosen(acts, places, noise)
    rotation = rotation_per_interval(twice, halves=half_cosines(twice, given))
    found = measure_decodability(twice, given)
    curves = presence_curves(twice.decoder_norms, found, (measure_firing(twice, given).rate > 0).numpy())
    kind = f"with noise of {noise:g} of the variance" if noise else "as they are"
    print(f"Copies of one snapshot, {kind}: beyond_null (least, most), births at a second copy, live features")
    share = rotation["beyond_null"].iloc[::2]
    for name in ("r2", "within"):
        values = curves[name]
        first = birth_index(values / np.maximum(values.max(1, keepdims=True), 1e-9) >= PRESENCE, 2)
        read = values.max(1) > 0
        born = (first % 2 == 1) & (first < len(places)) & read
        print(f"{name}: {share.mean():.3f} ({share.min():.3f}, {share.max():.3f}), {born.sum()} of {read.sum()}")


def print_orders(cc: Crosscoder, acts: cl.Activations, n: int) -> None:
    alive = measure_firing(cc, acts).rate > 0
    rng = np.random.default_rng(0)
    above = {"split": 0, "merger": 0}
    counts: dict[str, list[float]] = {"split": [], "merger": []}
    for seed in range(n):
        shuffled = at(cc, rng.permutation(cc.n_snapshots).tolist())
        _, rows = split_counts(shuffled, alive, seed=seed)
        for row in rows:
            above[row["kind"]] += row["n"] > row["most_by_chance"]
            counts[row["kind"]].append(row["n"])
    print(f"Random orders of the snapshots, {n}: mean number found, share above what chance gives at 5%")
    for kind, times in above.items():
        print(f"{kind}: {np.mean(counts[kind]):.1f}, {times / n:.3f}")
    _, rows = split_counts(cc, alive)
    for row in rows:
        print(f"{row['kind']}, in the order of training: {row['n']} ({row['by_chance']:.1f} by chance)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cc = cl.from_pretrained("crosslens-demo", HOOK)
    documents = list(grammar.documents(3_000, 1))
    data = cl.activations.Dataset(documents, n_tokens=20_000, held_out_tokens=8_000)
    acts = cl.Activations(cl.sharing.load_snapshots("crosslens-demo"), HOOK, data)
    for noise in (0.0, NOISE):
        print_copies(cc, acts, noise)
    print_orders(cc, acts, arguments.orders)


if __name__ == "__main__":
    main()
