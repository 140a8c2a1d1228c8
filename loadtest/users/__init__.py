"""One file a kind of user."""
