-- migrate:up
-- What this room has of the feeds that it reads. Why and how: runtime/feed, docs/bus.md.
ALTER TABLE ledger.inbox ADD COLUMN position bigint NOT NULL DEFAULT 0;

CREATE TABLE ledger.feed_cursor (
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

CREATE TABLE ledger.feed_missing (
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
CREATE INDEX feed_missing_key ON ledger.feed_missing (topic, consumer, key, position);

-- migrate:down
DROP TABLE ledger.feed_missing, ledger.feed_cursor;
ALTER TABLE ledger.inbox DROP COLUMN position;
