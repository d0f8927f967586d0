# %% One cache, three trainings
by_seed = quality["explained_variance"].groupby("seed").mean()
assert by_seed.min() > 0.97 and np.ptp(by_seed) < 0.01

# %% Is it the same feature?
assert matched["share_a"].between(0.25, 0.42).all() and matched["variance_a"].between(0.65, 0.95).all()
assert (matched["null_a"] < 0.01).all() and pairs["null"].quantile(0.99) < 0.3
assert (matched["cosine_a"] < matched["share_a"]).all()

# %% What most seeds find
assert bars.loc[1, "share of the features"] > 0.5 and bars.loc[1, "share of the variance"] < 0.15
all_tokens, fewer, frequent = shares.values()
assert fewer["consensus"] > all_tokens["consensus"] - 0.05
assert 0.6 < frequent["consensus"] < 0.9 and frequent["consensus"] > all_tokens["consensus"] + 0.2

# %% Do partners do the same?
found = alike(both)  # .86 to .95 over seven sets of kernels: they round differently, and training amplifies that
assert found["born at the same snapshot"] > 0.8 and chance["born at the same snapshot"].mean() < 0.75
assert chance["born at the same snapshot"].max() < found["born at the same snapshot"]
assert found["correlation of effects"] > chance["correlation of effects"].quantile(0.975)
matter = both.query("`seed 0` > 0.2")
kept = matter["seed 1"] / matter["seed 0"]
assert len(kept) >= 3 and kept.median() < 0.67 and (kept < 0.2).any()  # medians of .06 to .49; a single one up to 6.8

# %% Claims about counts and sets
assert claims["born"].between(28, 48).all() and (claims["born, reversed"] <= 5).all()
assert (claims["left, top 15 ablated"] < -0.5).all() and claims["left, random 15"].between(0.9, 1.1).all()
assert claims["consensus among the 15"].between(8, 14).all()
