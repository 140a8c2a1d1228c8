"""What a caller of Ducat installs: the generated stubs and a thin client."""
