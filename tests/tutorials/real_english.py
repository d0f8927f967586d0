# %% Two snapshots, two dictionaries
assert losses["held_out"].is_monotonic_decreasing and losses["held_out"].iloc[-1] < 4.5
assert quality["explained_variance"].min() > 0.85 and quality["dead_fraction"].max() < 0.1

# %% What is new?
assert births["born"].iloc[0] > 3 * births["born_reversed"].iloc[0] and len(new) >= 3

# %% What agreement needs
accuracy = task.accuracy(snaps)["accuracy"].tolist()
assert accuracy[0] < 0.65 and accuracy[-1] > 0.7
assert table.loc[top[0], "step400"] > 3 * table.loc[top[0], "step40"] and lifecycles.loc[top[0], "origin"] == "initial"
assert left.loc["top", 1] < 0.3 and left.loc[["change_matched", "size_matched", "random"]].min().min() > 0.7
