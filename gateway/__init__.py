"""The REST gateway: bounds the input, forwards it, answers. Holds no state."""
