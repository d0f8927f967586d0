# %% The task
by_task = accuracy.pivot(index="label", columns="task", values="accuracy").loc[snaps.labels]
assert (by_task.iloc[-1] > 0.9).all()
assert by_task.loc["step128", "simple"] > 0.8 and (by_task.loc["step128", ["pp", "subj_rel"]] < 0.25).all()

# %% Effects
assert sums["completeness_error"].max() < 0.001 and sums["with 5 left nodes"].between(0.005, 0.15).all()
assert agreement.iloc[1].min() > 0.9 and agreement.iloc[0, :2].min() > 0.9 and 0.7 < agreement.iloc[0, -1] < 0.9
assert 0.6 < agreement.iloc[2, -1] < 0.9

# %% Which features carry the right rule?
assert about["centre_of_mass"].is_monotonic_increasing and matrix["step640"].sum() > 5 * abs(matrix["step128"].sum())

# %% And the wrong rule? A blind spot
assert at_last > 0.5 and zero.completeness.max() < 0.05 and 3 <= (wrong.iloc[:, 3] < 0).sum() < len(wrong)
assert wrong.iloc[:, 1].sum() < -0.5 and abs(wrong.iloc[:, 2].sum()) < 0.3 * abs(wrong.iloc[:, 1].sum())

# %% Harmful, then helpful
assert len(changed) and (changed["from_ie"] < 0).all()

# %% Do they cause it? Ablation
removed = ablated.assign(share=cl.causal.faithfulness(ablated)).set_index(["features", "k"])["share"]
assert removed["top", 5] > 0.5 and removed["top", 15] > 0.8
assert removed["random", 15] < 0.2 and removed["size_matched", 15] < 0.2
assert (references["reconstruction_only"] > 0.6 * references["clean"]).all() and (references["all_edited"] < 0).all()

# %% Did new features replace the old ones?
assert matrix.loc["step336", "step640"] > 0.8 and matrix.loc["step640", "step640"] > 0.8
assert (matrix.loc[["step48", "step128", "step176"], "step640"] < 0.6).all() and matrix.loc["step224", "step640"] > 0.6

# %% Do effects add up?
assert additivity.summary.loc[0]["deviation"] < 0.3
