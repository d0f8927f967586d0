# %% Pretraining with snapshots
assert losses[0] > 3 and losses[-1] < 2

# %% Open it
assert len(messages) == 4 and "equal weights" in messages[0]

# %% Your own task
assert accuracy["accuracy"].iloc[-1] > 0.95 and accuracy["accuracy"].min() < 0.45

# %% The study, from the shell
assert Path("runs/mine/crosscoder/sae_weights.safetensors").is_file()
assert Path("runs/mine/report/index.html").is_file()
assert len(pd.read_parquet("runs/mine/lifecycles.parquet")) == 3 * 64
assert shown.query("label == 'step20'")["ie"].max() < 0.3 and shown.query("label == 'step300'")["ie"].max() > 0.5
assert run["identity"]["n_tokens"] >= 40_000

# %% One file for SAELens
assert torch.equal(sae.W_dec, cc.W_dec)

# %% A name for a group
assert torch.equal(again.W_dec, cc.W_dec) and cl.sharing.load_snapshots("my-agreement") == snaps

# %% To the hub
assert plan.url is None and str(Path.cwd()) not in plan.card
