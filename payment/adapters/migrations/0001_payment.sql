-- migrate:up
CREATE SCHEMA IF NOT EXISTS payment;

-- Money is bigint minor units beside its ISO 4217 code. States are the numbers of the enums in payment/domain and in the protos.
-- `history` is a JSON array [{"s": state, "c": cause, "t": unix ms}, …] that only grows. `revision` grows by one a change; every
-- write names the revision that it was decided on. `attention` is set where an operator must look.

CREATE TABLE payment.payment_event (
    checkout_id      text        PRIMARY KEY CHECK (length(checkout_id) BETWEEN 1 AND 128),
    content_hash     bytea       NOT NULL CHECK (octet_length(content_hash) = 32),
    buyer_id         text        NOT NULL,
    buyer_name       text        NOT NULL DEFAULT '',
    buyer_email      text        NOT NULL DEFAULT '',
    open_order_count integer     NOT NULL CHECK (open_order_count >= 0),
    is_payment_done  boolean     NOT NULL DEFAULT false,
    expire_time      timestamptz NOT NULL,
    create_time      timestamptz NOT NULL,
    update_time      timestamptz NOT NULL,
    CONSTRAINT payment_event_done CHECK (is_payment_done = (open_order_count = 0))
);
CREATE INDEX payment_event_newest ON payment.payment_event (create_time DESC, checkout_id DESC);
CREATE INDEX payment_event_buyer ON payment.payment_event (buyer_id, create_time DESC, checkout_id DESC);
CREATE INDEX payment_event_open ON payment.payment_event (expire_time) WHERE NOT is_payment_done;

-- No index of this table names `state`: an update that only moves the state is heap-only.
CREATE TABLE payment.payment_order (
    payment_order_id text        PRIMARY KEY CHECK (length(payment_order_id) BETWEEN 1 AND 128),
    checkout_id      text        NOT NULL REFERENCES payment.payment_event,
    position         smallint    NOT NULL,
    seller_account   text        NOT NULL,
    currency_code    text        NOT NULL CHECK (currency_code ~ '^[A-Z]{3}$'),
    amount_minor     bigint      NOT NULL CHECK (amount_minor BETWEEN 1 AND 1000000000000000),
    refunded_minor   bigint      NOT NULL DEFAULT 0,
    state            smallint    NOT NULL CHECK (state BETWEEN 1 AND 10),
    psp              text        NOT NULL DEFAULT '',
    psp_token        text        NOT NULL DEFAULT '',
    hosted_page_url  text        NOT NULL DEFAULT '',
    failure_reason   text        NOT NULL DEFAULT '',
    attention        text        NOT NULL DEFAULT '',
    cancel_requested boolean     NOT NULL DEFAULT false,
    traceparent      text        NOT NULL DEFAULT '',
    revision         bigint      NOT NULL DEFAULT 1,
    history          jsonb       NOT NULL,
    create_time      timestamptz NOT NULL,
    update_time      timestamptz NOT NULL,
    CONSTRAINT payment_order_position UNIQUE (checkout_id, position),
    CONSTRAINT payment_order_refunded CHECK (refunded_minor BETWEEN 0 AND amount_minor)
) WITH (fillfactor = 80);
CREATE UNIQUE INDEX payment_order_psp_token ON payment.payment_order (psp, psp_token) WHERE psp_token <> '';
CREATE INDEX payment_order_seller ON payment.payment_order (seller_account, create_time DESC);
CREATE INDEX payment_order_attention ON payment.payment_order (update_time) WHERE attention <> '';

CREATE TABLE payment.refund (
    refund_id        text        PRIMARY KEY CHECK (length(refund_id) BETWEEN 1 AND 128),
    payment_order_id text        NOT NULL REFERENCES payment.payment_order,
    content_hash     bytea       NOT NULL CHECK (octet_length(content_hash) = 32),
    currency_code    text        NOT NULL CHECK (currency_code ~ '^[A-Z]{3}$'),
    amount_minor     bigint      NOT NULL CHECK (amount_minor BETWEEN 1 AND 1000000000000000),
    state            smallint    NOT NULL CHECK (state BETWEEN 1 AND 4),
    psp              text        NOT NULL DEFAULT '',
    psp_refund_id    text        NOT NULL DEFAULT '',
    hold_id          bytea       NOT NULL DEFAULT '',
    reason           text        NOT NULL DEFAULT '',
    failure_reason   text        NOT NULL DEFAULT '',
    attention        text        NOT NULL DEFAULT '',
    traceparent      text        NOT NULL DEFAULT '',
    revision         bigint      NOT NULL DEFAULT 1,
    history          jsonb       NOT NULL,
    create_time      timestamptz NOT NULL,
    update_time      timestamptz NOT NULL
);
CREATE INDEX refund_order ON payment.refund (payment_order_id);
CREATE INDEX refund_newest ON payment.refund (create_time DESC, refund_id DESC);
CREATE INDEX refund_open ON payment.refund (update_time) WHERE state IN (1, 2);
CREATE UNIQUE INDEX refund_psp ON payment.refund (psp, psp_refund_id) WHERE psp_refund_id <> '';

-- `recipient` holds the bank details; `recipient_key_id` names the key that they are encrypted with, empty means that they are not.
CREATE TABLE payment.payout (
    reference         text        PRIMARY KEY CHECK (length(reference) BETWEEN 1 AND 128),
    content_hash      bytea       NOT NULL CHECK (octet_length(content_hash) = 32),
    seller_account    text        NOT NULL,
    currency_code     text        NOT NULL CHECK (currency_code ~ '^[A-Z]{3}$'),
    amount_minor      bigint      NOT NULL CHECK (amount_minor BETWEEN 1 AND 1000000000000000),
    recipient         jsonb       NOT NULL,
    recipient_key_id  text        NOT NULL DEFAULT '',
    purpose           text        NOT NULL,
    state             smallint    NOT NULL CHECK (state BETWEEN 1 AND 10),
    psp               text        NOT NULL,
    psp_payout_id     text        NOT NULL DEFAULT '',
    hold_id           bytea       NOT NULL DEFAULT '' CHECK (octet_length(hold_id) IN (0, 16)),
    failure_reason    text        NOT NULL DEFAULT '',
    attention         text        NOT NULL DEFAULT '',
    schedule_time     timestamptz,
    approval_required boolean     NOT NULL DEFAULT false,
    requested_by      text        NOT NULL DEFAULT '',
    approved_by       text        NOT NULL DEFAULT '',
    approve_time      timestamptz,
    traceparent       text        NOT NULL DEFAULT '',
    revision          bigint      NOT NULL DEFAULT 1,
    history           jsonb       NOT NULL,
    create_time       timestamptz NOT NULL,
    update_time       timestamptz NOT NULL
);
CREATE INDEX payout_newest ON payment.payout (create_time DESC, reference DESC);
CREATE INDEX payout_seller ON payment.payout (seller_account, create_time DESC, reference DESC);
CREATE INDEX payout_scheduled ON payment.payout (schedule_time) WHERE state = 2;
CREATE INDEX payout_open ON payment.payout (update_time) WHERE state IN (1, 3, 4, 5);
CREATE INDEX payout_attention ON payment.payout (update_time) WHERE attention <> '';
CREATE UNIQUE INDEX payout_psp ON payment.payout (psp, psp_payout_id) WHERE psp_payout_id <> '';

-- What PSPs told us, once each. outcome: 0 parked, 1 applied, 2 ignored, 3 flagged.
CREATE TABLE payment.psp_notification (
    psp               text        NOT NULL,
    psp_event_id      text        NOT NULL,
    kind              smallint    NOT NULL,
    outcome           smallint    NOT NULL CHECK (outcome BETWEEN 0 AND 3),
    reference         text        NOT NULL,
    content           jsonb       NOT NULL,
    attempt_count     integer     NOT NULL DEFAULT 0,
    next_attempt_time timestamptz,
    create_time       timestamptz NOT NULL,
    PRIMARY KEY (psp, psp_event_id)
);
CREATE INDEX psp_notification_parked ON payment.psp_notification (next_attempt_time) WHERE outcome = 0;
CREATE INDEX psp_notification_parked_object ON payment.psp_notification ((content ->> 'object')) WHERE outcome = 0;
CREATE INDEX psp_notification_flagged ON payment.psp_notification (create_time) WHERE outcome = 3;

CREATE TABLE payment.outbox (
    position    bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    topic       text        NOT NULL,
    key         text        NOT NULL,
    message_id  text        NOT NULL,
    payload     bytea       NOT NULL,
    traceparent text        NOT NULL DEFAULT '',
    create_time timestamptz NOT NULL DEFAULT now()
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_analyze_threshold = 1000000);

CREATE TABLE payment.inbox (
    consumer    text        NOT NULL,
    message_id  text        NOT NULL,
    create_time timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer, message_id)
);
CREATE INDEX inbox_create_time ON payment.inbox USING brin (create_time);

-- Stores a payment, its orders and their commands: one statement, one round trip, one transaction.
-- p_orders is [{"id","seller","currency","amount","psp","message_id","payload" (base64)}, …].
-- Returns 'created', 'replayed' (same content) or 'mismatch' (other content). Raises DU001 with the ids as detail, and stores
-- nothing, where order ids belong to other checkouts.
CREATE FUNCTION payment.create_payment(
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

-- Stores a payout and, where one is given, its first message. Returns as create_payment.
CREATE FUNCTION payment.create_payout(
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

-- Writes back what was decided on loaded states: inbox, notifications, orders, payouts, payments and outbox, in one statement and
-- one transaction. Where anything changed since it was loaded it raises DU002 and changes nothing: load and decide again.
-- p is one document, because encoding forty array arguments costs the caller more than this whole function; each part is a list
-- that is there only when it is not empty:
--   messages       ids for the inbox of p_consumer
--   orders         written where the revision is still "was"
--   payouts        likewise
--   notifications  new, or parked so far
--   outbox         messages in their order, payload in base64
--   closed         payments with the number of orders that ended now, and payment_completed in case none is open any more
--   changed        checkout_ids to tell watchers of
--   objects        PSP objects that became known
-- Returns true where notifications are parked that tell of one of those objects.
CREATE FUNCTION payment.apply(p_now timestamptz, p_consumer text, p jsonb) RETURNS boolean LANGUAGE plpgsql AS $$
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

-- migrate:down
DROP FUNCTION payment.apply;
DROP FUNCTION payment.create_payout;
DROP FUNCTION payment.create_payment;
DROP TABLE payment.inbox, payment.outbox, payment.psp_notification, payment.payout, payment.refund, payment.payment_order,
    payment.payment_event;
