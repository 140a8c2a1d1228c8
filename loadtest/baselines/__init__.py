"""What a platform has before it has an event log: the same workload on sharded Valkey, and on two databases with Try, Confirm, Cancel.

`ducat bench compare` runs them beside the wallet core and kills each in mid-run.
"""
