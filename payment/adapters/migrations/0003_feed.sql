-- migrate:up
-- What this room publishes, in its order: the truth behind the bus. Why and how: runtime/outbox.py, runtime/feed, docs/bus.md.
CREATE TABLE payment.feed (
    topic       text        NOT NULL,
    position    bigint      NOT NULL CHECK (position >= 1),
    message_id  text        NOT NULL,
    key         text        NOT NULL,
    payload     bytea       NOT NULL,
    traceparent text        NOT NULL DEFAULT '',
    create_time timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (topic, position)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 50000, autovacuum_analyze_threshold = 1000000);

CREATE TABLE payment.feed_head (
    topic              text   PRIMARY KEY,
    feed_id            text   NOT NULL DEFAULT gen_random_uuid(),
    position           bigint NOT NULL DEFAULT 0,
    published_position bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 20);
INSERT INTO payment.feed_head (topic) VALUES ('payment.commands'), ('payment.events');

-- Who reads. Pruning waits for every one of them, also for one that has never asked yet.
CREATE TABLE payment.feed_consumer (
    topic           text        NOT NULL,
    consumer        text        NOT NULL,
    proven_position bigint      NOT NULL DEFAULT 0,
    missing_count   bigint      NOT NULL DEFAULT 0,
    problem         text        NOT NULL DEFAULT '',
    update_time     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (topic, consumer)
) WITH (fillfactor = 20);
INSERT INTO payment.feed_consumer (topic, consumer)
VALUES ('payment.commands', 'executor'), ('payment.events', 'ledger'), ('payment.events', 'wallet');

-- What this room has of the feeds that it reads.
ALTER TABLE payment.inbox ADD COLUMN position bigint NOT NULL DEFAULT 0;

CREATE TABLE payment.feed_cursor (
    topic             text        NOT NULL,
    consumer          text        NOT NULL,
    feed_id           text        NOT NULL DEFAULT '',
    compared_position bigint      NOT NULL DEFAULT 0,
    proven_position   bigint      NOT NULL DEFAULT 0,
    digest_after      bigint      NOT NULL DEFAULT 0,
    digest            bytea       NOT NULL DEFAULT '',
    problem           text        NOT NULL DEFAULT '',
    caught_up_time    timestamptz NOT NULL DEFAULT now(),
    update_time       timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (topic, consumer)
) WITH (fillfactor = 20);

CREATE TABLE payment.feed_missing (
    topic         text        NOT NULL,
    consumer      text        NOT NULL,
    position      bigint      NOT NULL,
    message_id    text        NOT NULL,
    key           text        NOT NULL,
    try_count     integer     NOT NULL DEFAULT 0,
    next_try_time timestamptz NOT NULL DEFAULT now(),
    error         text        NOT NULL DEFAULT '',
    create_time   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (topic, consumer, position)
);
CREATE INDEX feed_missing_key ON payment.feed_missing (topic, consumer, key, position);

-- migrate:down
-- What the bus does not have yet goes back to where the version before looks for it.
INSERT INTO payment.outbox (topic, key, message_id, payload, traceparent)
SELECT f.topic, f.key, f.message_id, f.payload, f.traceparent FROM payment.feed AS f JOIN payment.feed_head AS h USING (topic)
WHERE f.position > h.published_position ORDER BY f.topic, f.position;
DROP TABLE payment.feed_missing, payment.feed_cursor, payment.feed_consumer, payment.feed_head, payment.feed;
ALTER TABLE payment.inbox DROP COLUMN position;
