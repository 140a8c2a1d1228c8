"""The `ducat` command: starts the platform, shows it, and repairs it."""
