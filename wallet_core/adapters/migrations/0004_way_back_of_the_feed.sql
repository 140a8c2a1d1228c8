-- migrate:up
-- Only the way back needs anything.
COMMENT ON TABLE wallet.feed IS 'what this room publishes, in its order (docs/bus.md)';

-- migrate:down
-- The version before the feed has no outbox, so an answer that is only here would be lost. The migration that made the feed asks the head,
-- which is noted a moment late, and not whether payment has proven what was published: the bus may have lost it.
DO $$ BEGIN
    IF EXISTS (SELECT FROM wallet.outbox) OR EXISTS (
        SELECT FROM wallet.feed AS f LEFT JOIN wallet.feed_head AS h USING (topic)
        WHERE f.position > least(coalesce(h.published_position, 0),
                                 (SELECT min(c.proven_position) FROM wallet.feed_consumer AS c WHERE c.topic = f.topic))
    ) THEN
        RAISE EXCEPTION 'wallet: answers wait to be published, or payment has not proven them; let wallet and payment run until `ducat feed` '
            'shows no lag of wallet.events, then stop them and migrate';
    END IF;
END $$;
COMMENT ON TABLE wallet.feed IS NULL;
