"""The gateway's borders: HTTP on one side, the payment service over gRPC on the other."""
