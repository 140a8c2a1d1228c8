"""The payment service, the brain: takes checkouts, refunds and payouts, and keeps their state."""
