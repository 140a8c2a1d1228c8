"""The wallet core: sharded, event-sourced accounts and transfers."""
