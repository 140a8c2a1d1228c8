"""Where the payment service meets the world: gRPC, PostgreSQL, the bus, the executor."""
