"""Words everyone shares: money, ids, names, clock, errors, state tables. Pure; standard library only."""
