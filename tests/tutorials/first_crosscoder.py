# %% What the model learns, and when
assert table["simple"].iloc[-1] > 0.95 and table["pp"].iloc[-1] > 0.9
assert table["pp"].min() < 0.4, "the wrong rule comes first"

# %% Training
assert quality["explained_variance"].min() > 0.9 and 10 < quality["l0"].iloc[0] < 25 and quality["kl"].max() < 0.1

# %% When can a feature be read?
assert counts.loc["r2", "born"] > 2 * counts.loc["r2", "born_reversed"]

# %% When does it matter?
assert ie.completeness[-1] < 0.05
assert relie.sum(axis=1).sub(1).abs().max() < 1e-4
assert strength.loc[top.tolist(), "step48"].max() > 0.45 and strength.loc[top.tolist(), "step128"].max() > 2 / 3
assert ie.effects[top, :3].abs().max() < 0.15
assert relie[trained.labels[:3]].sum(axis=1).max() < 0.25, "these features act late"

# %% Does the model need them?
assert kept["top"] < 0.05 and kept["random"] > 0.9 and kept["size_matched"] > 0.85

# %% Save it
assert (again.decoder_norms == cc.decoder_norms).all()
