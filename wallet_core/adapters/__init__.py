"""Where the wallet meets the world: gRPC, bus, PostgreSQL, Valkey, the native host."""
