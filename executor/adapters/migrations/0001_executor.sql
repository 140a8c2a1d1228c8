-- migrate:up
CREATE SCHEMA IF NOT EXISTS executor;

-- kind: 1 order, 2 refund, 3 payout. state: 1 sending, 2 accepted, 3 rejected, 4 unknown (executor/domain/attempt.py).
-- No bank details and no card data, ever: a payout's are read from the payment service each time it is sent.
CREATE TABLE executor.attempt (
    kind             smallint    NOT NULL CHECK (kind BETWEEN 1 AND 3),
    reference        text        NOT NULL CHECK (length(reference) BETWEEN 1 AND 128),
    psp              text        NOT NULL,
    state            smallint    NOT NULL CHECK (state BETWEEN 1 AND 4),
    psp_object_id    text        NOT NULL DEFAULT '',
    hosted_page_url  text        NOT NULL DEFAULT '',
    code             text        NOT NULL DEFAULT '',
    reason           text        NOT NULL DEFAULT '',
    compliance       boolean     NOT NULL DEFAULT false,
    call_count       integer     NOT NULL DEFAULT 1,
    poll_count       integer     NOT NULL DEFAULT 0,
    cancel_requested boolean     NOT NULL DEFAULT false,
    -- what to send again
    checkout_id      text        NOT NULL DEFAULT '',
    seller_account   text        NOT NULL DEFAULT '',
    payment_order_id text        NOT NULL DEFAULT '',
    psp_token        text        NOT NULL DEFAULT '',
    currency_code    text        NOT NULL DEFAULT '',
    amount_minor     bigint      NOT NULL DEFAULT 0,
    requested_psp    text        NOT NULL DEFAULT '',
    buyer_email      text        NOT NULL DEFAULT '',
    traceparent      text        NOT NULL DEFAULT '',
    create_time      timestamptz NOT NULL,
    update_time      timestamptz NOT NULL,
    next_poll_time   timestamptz,
    PRIMARY KEY (kind, reference)
) WITH (fillfactor = 80);
CREATE INDEX attempt_due ON executor.attempt (next_poll_time) WHERE next_poll_time IS NOT NULL;

CREATE TABLE executor.psp_health (
    psp             text        PRIMARY KEY,
    failure_count   integer     NOT NULL CHECK (failure_count >= 0),
    open_until_time timestamptz,
    probing         boolean     NOT NULL,
    update_time     timestamptz NOT NULL
);

CREATE TABLE executor.outbox (
    position    bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    topic       text        NOT NULL,
    key         text        NOT NULL,
    message_id  text        NOT NULL,
    payload     bytea       NOT NULL,
    traceparent text        NOT NULL DEFAULT '',
    create_time timestamptz NOT NULL DEFAULT now()
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_analyze_threshold = 1000000);

-- migrate:down
DROP SCHEMA executor CASCADE;
