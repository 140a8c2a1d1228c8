"""One folder a payment service provider: capabilities · client · translate · webhook. See docs/how-to/add-a-psp.md."""
