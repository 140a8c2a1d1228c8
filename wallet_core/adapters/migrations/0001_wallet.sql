-- migrate:up
CREATE SCHEMA IF NOT EXISTS wallet;

-- The name directory: written before the account is opened, so every account that was opened by name has its name here.
CREATE TABLE wallet.account_name (
    account_id  bytea PRIMARY KEY CHECK (octet_length(account_id) = 16),
    name        text COLLATE "C" NOT NULL UNIQUE CHECK (length(name) BETWEEN 1 AND 200),
    currency    text NOT NULL,
    create_time timestamptz NOT NULL DEFAULT now()
);

-- The read model. It can be dropped and built again from the event logs: `ducat wallet rebuild`.

-- How far each shard's log is in wallet.transfer; moved in the statement that writes the rows.
CREATE TABLE wallet.projection (
    shard           smallint PRIMARY KEY,
    sequence_number bigint NOT NULL DEFAULT 0 CHECK (sequence_number >= 0),
    update_time     timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);

-- One row an event that is about a transfer. kind: EventKind, result: TransferResult of ducat.wallet.v1.
CREATE TABLE wallet.transfer (
    shard             smallint NOT NULL,
    sequence_number   bigint   NOT NULL,
    transfer_id       bytea    NOT NULL,
    debit_account_id  bytea,
    credit_account_id bytea,
    amount_minor      bigint   NOT NULL,
    kind              smallint NOT NULL,
    result            smallint NOT NULL,
    code              integer  NOT NULL,
    time_ns           bigint   NOT NULL,
    PRIMARY KEY (shard, sequence_number)
);
CREATE INDEX transfer_transfer_id ON wallet.transfer (transfer_id);
CREATE INDEX transfer_debit ON wallet.transfer (debit_account_id, time_ns, shard, sequence_number);
CREATE INDEX transfer_credit ON wallet.transfer (credit_account_id, time_ns, shard, sequence_number);

-- migrate:down
DROP TABLE wallet.transfer;
DROP TABLE wallet.projection;
DROP TABLE wallet.account_name;
