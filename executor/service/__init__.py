"""The executor's use cases, and the ports they stand on."""
