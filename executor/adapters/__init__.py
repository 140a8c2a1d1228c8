"""The executor's edges: bus, gRPC, PostgreSQL, the payment service."""
