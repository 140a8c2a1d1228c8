-- migrate:up
-- Only the way back needs anything.
COMMENT ON TABLE payment.feed IS 'what this room publishes, in its order (docs/bus.md)';

-- migrate:down
-- The migration that made the feed puts what the bus lacks back into the outbox, but behind what waits there already, so that a key's
-- messages change their order, and by the head, which is noted a moment late. So what waits moves into the feed first, as the relay moves
-- it; and what some consumer has not proven counts as not published: the bus may have lost it, and each message takes effect once.
WITH waiting AS (
    DELETE FROM payment.outbox RETURNING position AS place, topic, key, message_id, payload, traceparent
)
INSERT INTO payment.feed (topic, position, message_id, key, payload, traceparent)
SELECT w.topic,
       row_number() OVER (PARTITION BY w.topic ORDER BY w.place)
           + greatest((SELECT max(f.position) FROM payment.feed AS f WHERE f.topic = w.topic),
                      (SELECT h.position FROM payment.feed_head AS h WHERE h.topic = w.topic), 0),
       w.message_id, w.key, w.payload, w.traceparent
FROM waiting AS w;
INSERT INTO payment.feed_head (topic) SELECT DISTINCT topic FROM payment.feed ON CONFLICT DO NOTHING;
UPDATE payment.feed_head AS h
SET position = greatest(h.position, (SELECT max(f.position) FROM payment.feed AS f WHERE f.topic = h.topic)),
    published_position = least(h.published_position,
                               (SELECT min(c.proven_position) FROM payment.feed_consumer AS c WHERE c.topic = h.topic));
COMMENT ON TABLE payment.feed IS NULL;
