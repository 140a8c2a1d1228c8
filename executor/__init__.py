"""The hand: speaks to payment service providers, and only it. See docs/how-to/add-a-psp.md."""
