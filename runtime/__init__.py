"""What every process stands on: settings, process, gRPC server and channel, errors, security, trace, logs, metrics,
PostgreSQL, migrations, outbox, inbox, bus, embedded servers. Docs: docs/security.md.
"""
