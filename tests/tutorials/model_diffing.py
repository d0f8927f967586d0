# %% A new rule
assert accuracy.loc["fine-tuned"].min() > 0.9 and accuracy.loc[["base", "control"], "new rule"].max() < 0.1

# %% Two crosscoders
assert counts.loc["fine-tuned", "share > .6"] >= 4 and counts.loc["control", "share > .6"] == 0
assert only["R2 from fine-tuned"].mean() > only["R2 from base"].mean()

# %% Do they cause the new behaviour?
by = removed.set_index(["task", "features removed"])
after = by["metric"].xs("of the fine-tuned model", level=1)
before = by["metric"].xs("none", level=1)
assert abs(before["new rule"] - 3.01) < 0.3 and after["new rule"] < 0.5 * before["new rule"]
assert after["new rule"] < by["least"][[("new rule", "random"), ("new rule", "of the same size")]].min()
assert after["old rule"] > 0.9 * before["old rule"]
