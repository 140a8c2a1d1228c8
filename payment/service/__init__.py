"""What the payment service does: one class a use case family, each with the ports that it needs."""
