-- migrate:up

-- Which shards there are, and how far each was durable once: at least so far must its log reach when it is opened again. identity is
-- what the shard's own folder says too, so that the folder of another system is told from it. Written by the owner of the shard, and by
-- `ducat wallet restore` and `accept`, which alone may lower sequence_number.
CREATE TABLE wallet.shard (
    shard           smallint PRIMARY KEY CHECK (shard >= 0),
    identity        uuid NOT NULL,
    sequence_number bigint NOT NULL CHECK (sequence_number >= 0),
    update_time     timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);

-- migrate:down
DROP TABLE wallet.shard;
