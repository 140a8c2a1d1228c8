"""A payment service provider on your own machine: intents, a hosted page, refunds, payouts, webhooks, and faults on demand.

For development, tests and load tests only. docs/sandbox.md is its manual.
"""
