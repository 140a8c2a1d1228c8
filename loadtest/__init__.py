"""Load on a running platform: locust users, benchmarks, and the baselines to compare with."""
