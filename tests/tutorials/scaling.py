# %% Plan first
assert by_hand["forwards"] == plan.forwards and 1 < plan.cache_bytes / by_hand["cached, disk"] < 1.05
assert 1 < plan.cached_bytes / by_hand["cached, memory"] < 1.2
assert by_hand["weights, gradients, Adam"] < plan.training_bytes

# %% A cache that survives kill -9
assert harvest.returncode == -signal.SIGKILL and len(before) >= 2
assert len(after) == 2 * S and before.items() <= after.items()  # a shard of training and one of held-out sequences
assert after == shards("uninterrupted")

# %% Live or cached
assert set(measured) == {"live", "cached"}

# %% What a dtype costs
limits = {"float32": 1e-12, "bfloat16": 1e-5, "int8": 1e-3}
assert all(float(row["squared error, share"]) < limits[row["dtype"]] for row in rows)

# %% How much memory, over how many processes
assert round(16 * 2 * 32 * 768 * 98_304 / 1e9) == 77 and table.loc[1, "F = 98,304"] > 77e9 / 2**30

# %% Two processes, one crosscoder
assert min(float((d < 1e-5).float().mean()) for d in difference.values()) > 0.95
assert len(messages) == 3
