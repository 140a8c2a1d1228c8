"""Use cases of the wallet process, over ports: the shard host, the name directory, the read model, the bus
flows."""
