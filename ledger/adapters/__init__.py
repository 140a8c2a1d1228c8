"""The ledger's borders: PostgreSQL, the bus, gRPC."""
