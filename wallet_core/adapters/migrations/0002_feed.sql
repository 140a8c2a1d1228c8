-- migrate:up
-- What this room publishes, in its order: the truth behind the bus. Why and how: runtime/outbox.py, runtime/feed, docs/bus.md.
CREATE TABLE wallet.outbox (
    position    bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    topic       text        NOT NULL,
    key         text        NOT NULL,
    message_id  text        NOT NULL,
    payload     bytea       NOT NULL,
    traceparent text        NOT NULL DEFAULT '',
    create_time timestamptz NOT NULL DEFAULT now()
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_analyze_threshold = 1000000);

CREATE TABLE wallet.feed (
    topic       text        NOT NULL,
    position    bigint      NOT NULL CHECK (position >= 1),
    message_id  text        NOT NULL,
    key         text        NOT NULL,
    payload     bytea       NOT NULL,
    traceparent text        NOT NULL DEFAULT '',
    create_time timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (topic, position)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 50000, autovacuum_analyze_threshold = 1000000);

CREATE TABLE wallet.feed_head (
    topic              text   PRIMARY KEY,
    feed_id            text   NOT NULL DEFAULT gen_random_uuid(),
    position           bigint NOT NULL DEFAULT 0,
    published_position bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 20);
INSERT INTO wallet.feed_head (topic) VALUES ('wallet.events');

-- Who reads. Pruning waits for every one of them, also for one that has never asked yet.
CREATE TABLE wallet.feed_consumer (
    topic           text        NOT NULL,
    consumer        text        NOT NULL,
    proven_position bigint      NOT NULL DEFAULT 0,
    missing_count   bigint      NOT NULL DEFAULT 0,
    problem         text        NOT NULL DEFAULT '',
    update_time     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (topic, consumer)
) WITH (fillfactor = 20);
INSERT INTO wallet.feed_consumer (topic, consumer)
VALUES ('wallet.events', 'payment');

-- What this room has of the feeds that it reads.
CREATE TABLE wallet.inbox (
    consumer    text        NOT NULL,
    message_id  text        NOT NULL,
    create_time timestamptz NOT NULL DEFAULT now(),
    position    bigint      NOT NULL DEFAULT 0,
    PRIMARY KEY (consumer, message_id)
);
CREATE INDEX inbox_create_time ON wallet.inbox USING brin (create_time);

CREATE TABLE wallet.feed_cursor (
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

CREATE TABLE wallet.feed_missing (
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
CREATE INDEX feed_missing_key ON wallet.feed_missing (topic, consumer, key, position);

-- migrate:down
-- The version before has no outbox: an answer that the bus does not have yet would be lost with these tables.
DO $$ BEGIN
    IF EXISTS (SELECT FROM wallet.outbox) OR EXISTS (SELECT FROM wallet.feed_head WHERE position > published_position) THEN
        RAISE EXCEPTION 'wallet: answers wait to be published; let the wallet run until the bus has them, then stop it and migrate';
    END IF;
END $$;
DROP TABLE wallet.inbox, wallet.outbox, wallet.feed_missing, wallet.feed_cursor, wallet.feed_consumer, wallet.feed_head, wallet.feed;
