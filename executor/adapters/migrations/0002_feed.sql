-- migrate:up
-- What this room publishes, in its order: the truth behind the bus. Why and how: runtime/outbox.py, runtime/feed, docs/bus.md.
CREATE TABLE executor.feed (
    topic       text        NOT NULL,
    position    bigint      NOT NULL CHECK (position >= 1),
    message_id  text        NOT NULL,
    key         text        NOT NULL,
    payload     bytea       NOT NULL,
    traceparent text        NOT NULL DEFAULT '',
    create_time timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (topic, position)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 50000, autovacuum_analyze_threshold = 1000000);

CREATE TABLE executor.feed_head (
    topic              text   PRIMARY KEY,
    feed_id            text   NOT NULL DEFAULT gen_random_uuid(),
    position           bigint NOT NULL DEFAULT 0,
    published_position bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 20);
INSERT INTO executor.feed_head (topic) VALUES ('executor.events');

-- Who reads. Pruning waits for every one of them, also for one that has never asked yet.
CREATE TABLE executor.feed_consumer (
    topic           text        NOT NULL,
    consumer        text        NOT NULL,
    proven_position bigint      NOT NULL DEFAULT 0,
    missing_count   bigint      NOT NULL DEFAULT 0,
    problem         text        NOT NULL DEFAULT '',
    update_time     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (topic, consumer)
) WITH (fillfactor = 20);
INSERT INTO executor.feed_consumer (topic, consumer)
VALUES ('executor.events', 'payment');

-- What this room has of the feeds that it reads.
CREATE TABLE executor.inbox (
    consumer    text        NOT NULL,
    message_id  text        NOT NULL,
    create_time timestamptz NOT NULL DEFAULT now(),
    position    bigint      NOT NULL DEFAULT 0,
    PRIMARY KEY (consumer, message_id)
);
CREATE INDEX inbox_create_time ON executor.inbox USING brin (create_time);

CREATE TABLE executor.feed_cursor (
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

CREATE TABLE executor.feed_missing (
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
CREATE INDEX feed_missing_key ON executor.feed_missing (topic, consumer, key, position);

-- migrate:down
-- What the bus does not have yet goes back to where the version before looks for it.
INSERT INTO executor.outbox (topic, key, message_id, payload, traceparent)
SELECT f.topic, f.key, f.message_id, f.payload, f.traceparent FROM executor.feed AS f JOIN executor.feed_head AS h USING (topic)
WHERE f.position > h.published_position ORDER BY f.topic, f.position;
DROP TABLE executor.inbox, executor.feed_missing, executor.feed_cursor, executor.feed_consumer, executor.feed_head, executor.feed;
