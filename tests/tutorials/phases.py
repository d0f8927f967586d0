# %% What does the model predict?
assert floors["H2"].is_monotonic_increasing and floors["H2"].iloc[-1] > floors["H2"].iloc[0] + 0.5
assert np.ptp(floors["H1"]) < 0.1
assert (curves["kl1"].iloc[5:] < curves["kl1"].iloc[0] / 10).all() and curves["kl2"].iloc[5] < curves["kl2"].iloc[0] / 5
assert curves["loss"].is_monotonic_decreasing and (curves["loss"].iloc[9:] < dynamics.bigram_entropy).all()
crossing = table.query("event == 'below_bigram'")["snapshot"].fillna(len(snaps)).tolist()
assert crossing[0] > crossing[1]  # with few counts it comes later, or never

# %% Which snapshots belong in a dictionary?
assert doubtful["participation_ratio"].iloc[0] > 2 * doubtful["participation_ratio"].iloc[5:].max()

# %% Are features born?
births = orders["births"]
assert births["norm", "true"] < 1.5 * births["norm", "reversed"]
assert births["r2", "true"] > 4 * births["r2", "reversed"]

# %% Do features rotate?
assert rotation["largest"].idxmax() == 0
assert (rotation["median_cosine"] < rotation["cosine of activations"]).all()
assert (rotation["null_angle"] < rotation["halves_angle"]).all()

# %% Statistics first, features later?
settled = lines["Q, features settled"]
assert (settled.dropna().iloc[:4] < 0.25).all() and settled.iloc[11] > 0.5
assert accuracy["accuracy"].iloc[8] < 0.4 and accuracy["accuracy"].iloc[-1] > 0.9
assert (table["dimensionality"] < table["random_dimensionality"])[5:].all()
leads = found.query("event == 'statistics_lead'")
assert leads["lead"].min() > 0.8 and found.query("event == 'features_lead'")["lead"].max() < 0.1
assert leads["resolved"].all() and leads["jump"].max() < 0.6 and set(leads["label"]) <= {"step96", "step128"}
assert found.query("event == 'settling'")["step"].nunique() == 3

# %% The confound: is it only the warmup?
centre = rotations["before"].mul(rotations["share"]).groupby(rotations["warmup"]).sum()
assert centre["64 steps"] > centre["8 steps"] + 0.4
