-- migrate:up
-- The functions of 0001 without NOTIFY where nobody waits for it: PostgreSQL lets one notifying transaction commit at a time.
-- * The outbox relay is woken by the process that committed (runtime/outbox.py), and looks by itself each second.
-- * Watchers of payments hold the advisory lock (3341, 1) shared for as long as they listen (payment/adapters/changes.py). A
--   transaction that gets it exclusively, and so until its commit, knows that nobody listens yet: who begins to listen waits for
--   that commit and reads after it. One that does not get it, because of a watcher or of another such transaction, notifies.

CREATE OR REPLACE FUNCTION payment.create_payment(
    p_checkout_id text, p_content_hash bytea, p_buyer_id text, p_buyer_name text, p_buyer_email text,
    p_now timestamptz, p_expire_time timestamptz, p_traceparent text, p_history jsonb, p_orders jsonb
) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    stored_hash bytea;
    stored_count integer;
BEGIN
    INSERT INTO payment.payment_event (checkout_id, content_hash, buyer_id, buyer_name, buyer_email, open_order_count,
                                       expire_time, create_time, update_time)
    VALUES (p_checkout_id, p_content_hash, p_buyer_id, p_buyer_name, p_buyer_email, jsonb_array_length(p_orders),
            p_expire_time, p_now, p_now)
    ON CONFLICT (checkout_id) DO NOTHING;
    IF NOT FOUND THEN
        SELECT content_hash INTO STRICT stored_hash FROM payment.payment_event WHERE checkout_id = p_checkout_id;
        RETURN CASE WHEN stored_hash = p_content_hash THEN 'replayed' ELSE 'mismatch' END;
    END IF;

    -- In the order of the ids, so that two checkouts with the same ids cannot deadlock.
    INSERT INTO payment.payment_order (payment_order_id, checkout_id, position, seller_account, currency_code, amount_minor,
                                       state, psp, traceparent, history, create_time, update_time)
    SELECT u.id, p_checkout_id, u.position, u.seller, u.currency, u.amount, 1, u.psp, p_traceparent, p_history, p_now, p_now
    FROM ROWS FROM (jsonb_to_recordset(p_orders) AS (id text, seller text, currency text, amount bigint, psp text))
        WITH ORDINALITY AS u(id, seller, currency, amount, psp, position)
    ORDER BY u.id
    ON CONFLICT (payment_order_id) DO NOTHING;
    GET DIAGNOSTICS stored_count = ROW_COUNT;
    IF stored_count <> jsonb_array_length(p_orders) THEN
        RAISE EXCEPTION 'order ids belong to other checkouts' USING ERRCODE = 'DU001', DETAIL = (
            SELECT coalesce(json_agg(o.payment_order_id), '[]')
            FROM jsonb_to_recordset(p_orders) AS u(id text) JOIN payment.payment_order AS o ON o.payment_order_id = u.id
            WHERE o.checkout_id <> p_checkout_id
        );
    END IF;

    INSERT INTO payment.outbox (topic, key, message_id, payload, traceparent)
    SELECT 'payment.commands', u.id, u.message_id, decode(u.payload, 'base64'), p_traceparent
    FROM jsonb_to_recordset(p_orders) AS u(id text, message_id text, payload text);
    RETURN 'created';
END $$;

CREATE OR REPLACE FUNCTION payment.create_payout(
    p_reference text, p_content_hash bytea, p_seller text, p_currency text, p_amount bigint, p_recipient jsonb,
    p_recipient_key_id text, p_purpose text, p_state smallint, p_psp text, p_schedule_time timestamptz,
    p_now timestamptz, p_traceparent text, p_history jsonb, x_message_id text, x_payload bytea
) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    stored_hash bytea;
BEGIN
    INSERT INTO payment.payout (reference, content_hash, seller_account, currency_code, amount_minor, recipient,
                                recipient_key_id, purpose, state, psp, schedule_time, traceparent, history,
                                create_time, update_time)
    VALUES (p_reference, p_content_hash, p_seller, p_currency, p_amount, p_recipient, p_recipient_key_id, p_purpose, p_state,
            p_psp, p_schedule_time, p_traceparent, p_history, p_now, p_now)
    ON CONFLICT (reference) DO NOTHING;
    IF NOT FOUND THEN
        SELECT content_hash INTO STRICT stored_hash FROM payment.payout WHERE reference = p_reference;
        RETURN CASE WHEN stored_hash = p_content_hash THEN 'replayed' ELSE 'mismatch' END;
    END IF;
    IF x_message_id <> '' THEN
        INSERT INTO payment.outbox (topic, key, message_id, payload, traceparent)
        VALUES ('payment.events', p_reference, x_message_id, x_payload, p_traceparent);
    END IF;
    RETURN 'created';
END $$;

CREATE OR REPLACE FUNCTION payment.apply(p_now timestamptz, p_consumer text, p jsonb) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    n integer;
BEGIN
    IF p ? 'messages' THEN
        INSERT INTO payment.inbox (consumer, message_id)
        SELECT p_consumer, m FROM jsonb_array_elements_text(p -> 'messages') AS m ORDER BY m
        ON CONFLICT DO NOTHING;
        GET DIAGNOSTICS n = ROW_COUNT;
        IF n <> jsonb_array_length(p -> 'messages') THEN
            RAISE EXCEPTION 'messages were taken meanwhile' USING ERRCODE = 'DU002';
        END IF;
    END IF;

    IF p ? 'orders' THEN
        UPDATE payment.payment_order AS o
        SET state = u.state, psp = u.psp, psp_token = u.token, hosted_page_url = u.url, failure_reason = u.reason,
            attention = u.attention, cancel_requested = u.cancel, refunded_minor = u.refunded, revision = u.revision,
            history = o.history || u.history, update_time = p_now
        FROM jsonb_to_recordset(p -> 'orders')
            AS u(id text, was bigint, revision bigint, state smallint, psp text, token text, url text, reason text,
                 attention text, cancel boolean, refunded bigint, history jsonb)
        WHERE o.payment_order_id = u.id AND o.revision = u.was;
        GET DIAGNOSTICS n = ROW_COUNT;
        IF n <> jsonb_array_length(p -> 'orders') THEN
            RAISE EXCEPTION 'orders changed meanwhile' USING ERRCODE = 'DU002';
        END IF;
    END IF;

    IF p ? 'payouts' THEN
        UPDATE payment.payout AS q
        SET state = u.state, psp_payout_id = u.token, hold_id = decode(u.hold, 'hex'), failure_reason = u.reason,
            attention = u.attention, revision = u.revision, history = q.history || u.history, update_time = p_now
        FROM jsonb_to_recordset(p -> 'payouts')
            AS u(id text, was bigint, revision bigint, state smallint, token text, hold text, reason text, attention text,
                 history jsonb)
        WHERE q.reference = u.id AND q.revision = u.was;
        GET DIAGNOSTICS n = ROW_COUNT;
        IF n <> jsonb_array_length(p -> 'payouts') THEN
            RAISE EXCEPTION 'payouts changed meanwhile' USING ERRCODE = 'DU002';
        END IF;
    END IF;

    IF p ? 'notifications' THEN
        -- Only a parked one may get another outcome. Everything else that is there already was applied by somebody else.
        INSERT INTO payment.psp_notification AS known (psp, psp_event_id, kind, outcome, reference, content, attempt_count,
                                                       next_attempt_time, create_time)
        SELECT u.psp, u.id, u.kind, u.outcome, u.reference, u.content, u.attempts, u.next, p_now
        FROM jsonb_to_recordset(p -> 'notifications')
            AS u(psp text, id text, kind smallint, outcome smallint, reference text, content jsonb, attempts integer,
                 next timestamptz)
        ORDER BY u.psp, u.id
        ON CONFLICT (psp, psp_event_id) DO UPDATE
        SET outcome = excluded.outcome, reference = excluded.reference, attempt_count = excluded.attempt_count,
            next_attempt_time = excluded.next_attempt_time
        WHERE known.outcome = 0;
        GET DIAGNOSTICS n = ROW_COUNT;
        IF n <> jsonb_array_length(p -> 'notifications') THEN
            RAISE EXCEPTION 'notifications were applied meanwhile' USING ERRCODE = 'DU002';
        END IF;
    END IF;

    IF p ? 'outbox' THEN
        INSERT INTO payment.outbox (topic, key, message_id, payload, traceparent)
        SELECT u.topic, u.key, u.id, decode(u.payload, 'base64'), u.trace
        FROM jsonb_to_recordset(p -> 'outbox') AS u(topic text, key text, id text, payload text, trace text);
    END IF;

    -- The row lock on the payment makes orders that end at the same time count one after the other: exactly one sees zero.
    IF p ? 'closed' THEN
        WITH ended AS (
            SELECT * FROM jsonb_to_recordset(p -> 'closed')
                AS u(checkout_id text, count integer, id text, payload text, trace text)
        ), locked AS (
            SELECT e.checkout_id FROM payment.payment_event AS e
            WHERE e.checkout_id IN (SELECT checkout_id FROM ended) ORDER BY e.checkout_id FOR UPDATE
        ), counted AS (
            UPDATE payment.payment_event AS e
            SET open_order_count = e.open_order_count - ended.count, is_payment_done = (e.open_order_count = ended.count),
                update_time = p_now
            FROM ended JOIN locked USING (checkout_id)
            WHERE e.checkout_id = ended.checkout_id
            RETURNING e.checkout_id, e.is_payment_done
        )
        INSERT INTO payment.outbox (topic, key, message_id, payload, traceparent)
        SELECT 'payment.events', ended.checkout_id, ended.id, decode(ended.payload, 'base64'), ended.trace
        FROM ended JOIN counted USING (checkout_id) WHERE counted.is_payment_done;
    END IF;

    IF p ? 'changed' AND NOT pg_try_advisory_xact_lock(3341, 1) THEN
        PERFORM pg_notify('payment_changed', w) FROM jsonb_array_elements_text(p -> 'changed') AS w;
    END IF;
    RETURN p ? 'objects' AND EXISTS (
        SELECT FROM payment.psp_notification
        WHERE outcome = 0 AND content ->> 'object' IN (SELECT jsonb_array_elements_text(p -> 'objects'))
    );
END $$;

-- migrate:down
CREATE OR REPLACE FUNCTION payment.create_payment(
    p_checkout_id text, p_content_hash bytea, p_buyer_id text, p_buyer_name text, p_buyer_email text,
    p_now timestamptz, p_expire_time timestamptz, p_traceparent text, p_history jsonb, p_orders jsonb
) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    stored_hash bytea;
    stored_count integer;
BEGIN
    INSERT INTO payment.payment_event (checkout_id, content_hash, buyer_id, buyer_name, buyer_email, open_order_count,
                                       expire_time, create_time, update_time)
    VALUES (p_checkout_id, p_content_hash, p_buyer_id, p_buyer_name, p_buyer_email, jsonb_array_length(p_orders),
            p_expire_time, p_now, p_now)
    ON CONFLICT (checkout_id) DO NOTHING;
    IF NOT FOUND THEN
        SELECT content_hash INTO STRICT stored_hash FROM payment.payment_event WHERE checkout_id = p_checkout_id;
        RETURN CASE WHEN stored_hash = p_content_hash THEN 'replayed' ELSE 'mismatch' END;
    END IF;

    -- In the order of the ids, so that two checkouts with the same ids cannot deadlock.
    INSERT INTO payment.payment_order (payment_order_id, checkout_id, position, seller_account, currency_code, amount_minor,
                                       state, psp, traceparent, history, create_time, update_time)
    SELECT u.id, p_checkout_id, u.position, u.seller, u.currency, u.amount, 1, u.psp, p_traceparent, p_history, p_now, p_now
    FROM ROWS FROM (jsonb_to_recordset(p_orders) AS (id text, seller text, currency text, amount bigint, psp text))
        WITH ORDINALITY AS u(id, seller, currency, amount, psp, position)
    ORDER BY u.id
    ON CONFLICT (payment_order_id) DO NOTHING;
    GET DIAGNOSTICS stored_count = ROW_COUNT;
    IF stored_count <> jsonb_array_length(p_orders) THEN
        RAISE EXCEPTION 'order ids belong to other checkouts' USING ERRCODE = 'DU001', DETAIL = (
            SELECT coalesce(json_agg(o.payment_order_id), '[]')
            FROM jsonb_to_recordset(p_orders) AS u(id text) JOIN payment.payment_order AS o ON o.payment_order_id = u.id
            WHERE o.checkout_id <> p_checkout_id
        );
    END IF;

    INSERT INTO payment.outbox (topic, key, message_id, payload, traceparent)
    SELECT 'payment.commands', u.id, u.message_id, decode(u.payload, 'base64'), p_traceparent
    FROM jsonb_to_recordset(p_orders) AS u(id text, message_id text, payload text);
    PERFORM pg_notify('payment_outbox', '');
    RETURN 'created';
END $$;

CREATE OR REPLACE FUNCTION payment.create_payout(
    p_reference text, p_content_hash bytea, p_seller text, p_currency text, p_amount bigint, p_recipient jsonb,
    p_recipient_key_id text, p_purpose text, p_state smallint, p_psp text, p_schedule_time timestamptz,
    p_now timestamptz, p_traceparent text, p_history jsonb, x_message_id text, x_payload bytea
) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    stored_hash bytea;
BEGIN
    INSERT INTO payment.payout (reference, content_hash, seller_account, currency_code, amount_minor, recipient,
                                recipient_key_id, purpose, state, psp, schedule_time, traceparent, history,
                                create_time, update_time)
    VALUES (p_reference, p_content_hash, p_seller, p_currency, p_amount, p_recipient, p_recipient_key_id, p_purpose, p_state,
            p_psp, p_schedule_time, p_traceparent, p_history, p_now, p_now)
    ON CONFLICT (reference) DO NOTHING;
    IF NOT FOUND THEN
        SELECT content_hash INTO STRICT stored_hash FROM payment.payout WHERE reference = p_reference;
        RETURN CASE WHEN stored_hash = p_content_hash THEN 'replayed' ELSE 'mismatch' END;
    END IF;
    IF x_message_id <> '' THEN
        INSERT INTO payment.outbox (topic, key, message_id, payload, traceparent)
        VALUES ('payment.events', p_reference, x_message_id, x_payload, p_traceparent);
        PERFORM pg_notify('payment_outbox', '');
    END IF;
    RETURN 'created';
END $$;

CREATE OR REPLACE FUNCTION payment.apply(p_now timestamptz, p_consumer text, p jsonb) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    n integer;
BEGIN
    IF p ? 'messages' THEN
        INSERT INTO payment.inbox (consumer, message_id)
        SELECT p_consumer, m FROM jsonb_array_elements_text(p -> 'messages') AS m ORDER BY m
        ON CONFLICT DO NOTHING;
        GET DIAGNOSTICS n = ROW_COUNT;
        IF n <> jsonb_array_length(p -> 'messages') THEN
            RAISE EXCEPTION 'messages were taken meanwhile' USING ERRCODE = 'DU002';
        END IF;
    END IF;

    IF p ? 'orders' THEN
        UPDATE payment.payment_order AS o
        SET state = u.state, psp = u.psp, psp_token = u.token, hosted_page_url = u.url, failure_reason = u.reason,
            attention = u.attention, cancel_requested = u.cancel, refunded_minor = u.refunded, revision = u.revision,
            history = o.history || u.history, update_time = p_now
        FROM jsonb_to_recordset(p -> 'orders')
            AS u(id text, was bigint, revision bigint, state smallint, psp text, token text, url text, reason text,
                 attention text, cancel boolean, refunded bigint, history jsonb)
        WHERE o.payment_order_id = u.id AND o.revision = u.was;
        GET DIAGNOSTICS n = ROW_COUNT;
        IF n <> jsonb_array_length(p -> 'orders') THEN
            RAISE EXCEPTION 'orders changed meanwhile' USING ERRCODE = 'DU002';
        END IF;
    END IF;

    IF p ? 'payouts' THEN
        UPDATE payment.payout AS q
        SET state = u.state, psp_payout_id = u.token, hold_id = decode(u.hold, 'hex'), failure_reason = u.reason,
            attention = u.attention, revision = u.revision, history = q.history || u.history, update_time = p_now
        FROM jsonb_to_recordset(p -> 'payouts')
            AS u(id text, was bigint, revision bigint, state smallint, token text, hold text, reason text, attention text,
                 history jsonb)
        WHERE q.reference = u.id AND q.revision = u.was;
        GET DIAGNOSTICS n = ROW_COUNT;
        IF n <> jsonb_array_length(p -> 'payouts') THEN
            RAISE EXCEPTION 'payouts changed meanwhile' USING ERRCODE = 'DU002';
        END IF;
    END IF;

    IF p ? 'notifications' THEN
        -- Only a parked one may get another outcome. Everything else that is there already was applied by somebody else.
        INSERT INTO payment.psp_notification AS known (psp, psp_event_id, kind, outcome, reference, content, attempt_count,
                                                       next_attempt_time, create_time)
        SELECT u.psp, u.id, u.kind, u.outcome, u.reference, u.content, u.attempts, u.next, p_now
        FROM jsonb_to_recordset(p -> 'notifications')
            AS u(psp text, id text, kind smallint, outcome smallint, reference text, content jsonb, attempts integer,
                 next timestamptz)
        ORDER BY u.psp, u.id
        ON CONFLICT (psp, psp_event_id) DO UPDATE
        SET outcome = excluded.outcome, reference = excluded.reference, attempt_count = excluded.attempt_count,
            next_attempt_time = excluded.next_attempt_time
        WHERE known.outcome = 0;
        GET DIAGNOSTICS n = ROW_COUNT;
        IF n <> jsonb_array_length(p -> 'notifications') THEN
            RAISE EXCEPTION 'notifications were applied meanwhile' USING ERRCODE = 'DU002';
        END IF;
    END IF;

    IF p ? 'outbox' THEN
        INSERT INTO payment.outbox (topic, key, message_id, payload, traceparent)
        SELECT u.topic, u.key, u.id, decode(u.payload, 'base64'), u.trace
        FROM jsonb_to_recordset(p -> 'outbox') AS u(topic text, key text, id text, payload text, trace text);
        PERFORM pg_notify('payment_outbox', '');
    END IF;

    -- The row lock on the payment makes orders that end at the same time count one after the other: exactly one sees zero.
    IF p ? 'closed' THEN
        WITH ended AS (
            SELECT * FROM jsonb_to_recordset(p -> 'closed')
                AS u(checkout_id text, count integer, id text, payload text, trace text)
        ), locked AS (
            SELECT e.checkout_id FROM payment.payment_event AS e
            WHERE e.checkout_id IN (SELECT checkout_id FROM ended) ORDER BY e.checkout_id FOR UPDATE
        ), counted AS (
            UPDATE payment.payment_event AS e
            SET open_order_count = e.open_order_count - ended.count, is_payment_done = (e.open_order_count = ended.count),
                update_time = p_now
            FROM ended JOIN locked USING (checkout_id)
            WHERE e.checkout_id = ended.checkout_id
            RETURNING e.checkout_id, e.is_payment_done
        )
        INSERT INTO payment.outbox (topic, key, message_id, payload, traceparent)
        SELECT 'payment.events', ended.checkout_id, ended.id, decode(ended.payload, 'base64'), ended.trace
        FROM ended JOIN counted USING (checkout_id) WHERE counted.is_payment_done;
        PERFORM pg_notify('payment_outbox', '');
    END IF;

    IF p ? 'changed' THEN
        PERFORM pg_notify('payment_changed', w) FROM jsonb_array_elements_text(p -> 'changed') AS w;
    END IF;
    RETURN p ? 'objects' AND EXISTS (
        SELECT FROM payment.psp_notification
        WHERE outcome = 0 AND content ->> 'object' IN (SELECT jsonb_array_elements_text(p -> 'objects'))
    );
END $$;
