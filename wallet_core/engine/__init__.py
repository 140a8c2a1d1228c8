"""The wallet engine: one deterministic state machine a shard, native (`_engine`) with a plain Python twin
(`twin`)."""
