# %% Does each language have its own features?
assert (by_language.iloc[-1] > 0.9).all() and (by_language.loc["step176"] < 0.3).all()
common = set(" ".join(texts["en"]).split()) & set(" ".join(texts["fr"]).split())
assert common == {"."}
assert share["fr"] > 0.3 and share["en again"] < 0.02
least = often[["before a stop, en", "before a stop, fr"]].min(axis=1)
assert (least > 3 * base).sum() >= 2 and often["strongest on, en"].str.startswith(".").any()

# %% Does the task use the same features?
assert (between["shared"] <= 1).all()
assert all((rows["shared"].iloc[1:] >= 6).all() for title, rows in lines.items() if "halves" in title)
assert all((rows["shared"].iloc[3:] >= 8).all() for title, rows in lines.items() if "halves" in title)
assert by_k["shared"].iloc[:2].max() <= 1 and (by_k["p"].iloc[:4] > 0.05).all()
assert 0.01 < by_k["p"].iloc[4] < 0.1

# %% What one language's features do in the other
same = across["selected on"] == across["ablated on"]
assert (across.loc[~same, "relative activity"] < 0.1).all()
assert (across.loc[same, "top 10"] > 0.7).all() and (across.loc[~same, "top 10"].abs() < 0.2).all()

# %% Do they write the same?
assert abs(cosine) < 0.1
at_end = added[added["label"] == snaps.labels[-1]].set_index(["added", "prompts"])
assert at_end.loc[("en", "en"), "share"] > 0.6 and at_end.loc[("fr", "fr"), "share"] > 0.6
assert (at_end["random, mean"] < 0.2).all()
assert at_end.loc[("en", "fr"), "share"] > at_end.loc[("en", "fr"), "random, 97.5 %"]
late = added[(added["added"] == "en") & (added["prompts"] == "fr") & added["label"].isin(snaps.labels[-3:])]
assert late["share"].between(0.4, 0.7).all() and (late["share"] > late["random, 97.5 %"]).all()
assert at_end.loc[("fr", "en"), "share"] < 0.25

# %% What a shared feature would look like
assert counted.set_index("n_languages").loc[2, "features"] <= 1
