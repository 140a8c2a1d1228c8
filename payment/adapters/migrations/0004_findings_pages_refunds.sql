-- migrate:up
-- Findings are kept as a list, buyers' pages have addresses that nobody can guess, refunds that were made at a PSP are booked.

-- --- pages: 128 random bits. Looked up by their hash, so that no comparison of the index tells anything about a key.

ALTER TABLE payment.payment_event ADD COLUMN page_key text NOT NULL DEFAULT encode(
    substring(sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())) FROM 1 FOR 16), 'hex');
ALTER TABLE payment.payment_event ALTER COLUMN page_key DROP DEFAULT;
ALTER TABLE payment.payment_event ADD CONSTRAINT payment_event_page_key CHECK (page_key ~ '^[0-9a-f]{32}$');
CREATE UNIQUE INDEX payment_event_page ON payment.payment_event (sha256(decode(page_key, 'hex')));

DROP FUNCTION payment.create_payment(text, bytea, text, text, text, timestamptz, timestamptz, text, jsonb, jsonb);
CREATE FUNCTION payment.create_payment(
    p_checkout_id text, p_content_hash bytea, p_buyer_id text, p_buyer_name text, p_buyer_email text,
    p_now timestamptz, p_expire_time timestamptz, p_traceparent text, p_history jsonb, p_orders jsonb, p_page_key text
) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    stored_hash bytea;
    stored_count integer;
BEGIN
    INSERT INTO payment.payment_event (checkout_id, content_hash, buyer_id, buyer_name, buyer_email, open_order_count,
                                       expire_time, create_time, update_time, page_key)
    VALUES (p_checkout_id, p_content_hash, p_buyer_id, p_buyer_name, p_buyer_email, jsonb_array_length(p_orders),
            p_expire_time, p_now, p_now, p_page_key)
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

-- --- findings. finding_id is a hash of what it says: told again, it is the same. ours, theirs: text by name.

CREATE TABLE payment.finding (
    finding_id     text        PRIMARY KEY,
    kind           smallint    NOT NULL CHECK (kind > 0),
    subject        smallint    NOT NULL CHECK (subject BETWEEN 1 AND 3),
    reference      text        NOT NULL,
    checkout_id    text        NOT NULL DEFAULT '',
    seller_account text        NOT NULL DEFAULT '',
    psp            text        NOT NULL DEFAULT '',
    psp_event_id   text        NOT NULL DEFAULT '',
    text           text        NOT NULL,
    ours           jsonb       NOT NULL DEFAULT '{}',
    theirs         jsonb       NOT NULL DEFAULT '{}',
    create_time    timestamptz NOT NULL,
    resolve_time   timestamptz,
    resolved_by    text        NOT NULL DEFAULT '',
    reason         text        NOT NULL DEFAULT '',
    request_id     text        NOT NULL DEFAULT '',
    CONSTRAINT finding_resolved CHECK ((resolve_time IS NULL) = (request_id = ''))
);
CREATE INDEX finding_newest ON payment.finding (create_time DESC, finding_id DESC);
CREATE INDEX finding_open ON payment.finding (create_time DESC, finding_id DESC) WHERE resolve_time IS NULL;
CREATE INDEX finding_open_checkout ON payment.finding (checkout_id) WHERE resolve_time IS NULL AND checkout_id <> '';
CREATE INDEX finding_checkout ON payment.finding (checkout_id, create_time DESC, finding_id DESC) WHERE checkout_id <> '';
CREATE INDEX finding_reference ON payment.finding (reference, subject, create_time DESC, finding_id DESC);
CREATE UNIQUE INDEX finding_request ON payment.finding (request_id) WHERE request_id <> '';

INSERT INTO payment.finding (finding_id, kind, subject, reference, checkout_id, seller_account, psp, text, create_time)
SELECT encode(substring(sha256(convert_to('order/' || payment_order_id || '/' || attention, 'UTF8')) FROM 1 FOR 16), 'hex'),
    13, 1, payment_order_id, checkout_id, seller_account, psp, attention, update_time
FROM payment.payment_order WHERE attention <> '';
INSERT INTO payment.finding (finding_id, kind, subject, reference, seller_account, psp, text, create_time)
SELECT encode(substring(sha256(convert_to('payout/' || reference || '/' || attention, 'UTF8')) FROM 1 FOR 16), 'hex'),
    13, 2, reference, seller_account, psp, attention, update_time
FROM payment.payout WHERE attention <> '';

-- --- refunds. booking: 0 nothing to book, 1 the wallet was asked, 2 booked, 3 reversed. held_minor: asked of the wallet, then
-- taken from it; the rest is claimed. disputed_minor: what a dispute took, which is what refunds had left.

ALTER TABLE payment.payment_order ADD COLUMN disputed_minor bigint NOT NULL DEFAULT 0;
UPDATE payment.payment_order SET disputed_minor = amount_minor WHERE state IN (9, 10);
ALTER TABLE payment.refund
    ADD COLUMN checkout_id    text     NOT NULL DEFAULT '',
    ADD COLUMN seller_account text     NOT NULL DEFAULT '',
    ADD COLUMN booking        smallint NOT NULL DEFAULT 0 CHECK (booking BETWEEN 0 AND 3),
    ADD COLUMN hold_count     smallint NOT NULL DEFAULT 0,
    ADD COLUMN held_minor     bigint   NOT NULL DEFAULT 0,
    ADD COLUMN made_at_psp    boolean  NOT NULL DEFAULT false,
    ADD CONSTRAINT refund_held CHECK (held_minor BETWEEN 0 AND amount_minor);

-- What payment.apply does, and the parts that are rare:
--   refunds   new (was = 0), or written where the revision is still "was"
--   disputes  what a dispute took of an order, by its id
--   findings  kept once each; the newest open text of an order or payout is its `attention`
CREATE FUNCTION payment.apply_rare(p_now timestamptz, p_consumer text, p jsonb) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    has_parked boolean;
    n integer;
    m integer;
BEGIN
    has_parked := payment.apply(p_now, p_consumer, p);

    IF p ? 'refunds' THEN
        INSERT INTO payment.refund (refund_id, payment_order_id, checkout_id, seller_account, content_hash, currency_code,
                                    amount_minor, state, psp, psp_refund_id, booking, hold_count, held_minor, hold_id,
                                    made_at_psp, reason, failure_reason, traceparent, revision, history, create_time, update_time)
        SELECT u.id, u.order_id, u.checkout_id, u.seller, sha256(convert_to(u.id, 'UTF8')), u.currency, u.amount, u.state, u.psp,
            u.token, u.booking, u.holds, u.held, decode(u.hold, 'hex'), u.made_at_psp, u.reason, u.failure, u.trace, u.revision,
            u.history, p_now, p_now
        FROM jsonb_to_recordset(p -> 'refunds')
            AS u(id text, was bigint, revision bigint, order_id text, checkout_id text, seller text, currency text, amount bigint,
                 state smallint, psp text, token text, booking smallint, holds smallint, held bigint, hold text,
                 made_at_psp boolean, reason text, failure text, trace text, history jsonb)
        WHERE u.was = 0
        ORDER BY u.id
        ON CONFLICT DO NOTHING;
        GET DIAGNOSTICS n = ROW_COUNT;
        UPDATE payment.refund AS r
        SET state = u.state, booking = u.booking, hold_count = u.holds, held_minor = u.held, hold_id = decode(u.hold, 'hex'),
            failure_reason = u.failure, revision = u.revision, history = r.history || u.history, update_time = p_now
        FROM jsonb_to_recordset(p -> 'refunds')
            AS u(id text, was bigint, revision bigint, state smallint, booking smallint, holds smallint, held bigint, hold text,
                 failure text, history jsonb)
        WHERE u.was > 0 AND r.refund_id = u.id AND r.revision = u.was;
        GET DIAGNOSTICS m = ROW_COUNT;
        IF n + m <> jsonb_array_length(p -> 'refunds') THEN
            RAISE EXCEPTION 'refunds changed meanwhile' USING ERRCODE = 'DU002';
        END IF;
    END IF;

    IF p ? 'disputes' THEN
        UPDATE payment.payment_order AS o SET disputed_minor = u.amount
        FROM jsonb_to_recordset(p -> 'disputes') AS u(id text, amount bigint) WHERE o.payment_order_id = u.id;
    END IF;

    IF p ? 'findings' THEN
        INSERT INTO payment.finding (finding_id, kind, subject, reference, checkout_id, seller_account, psp, psp_event_id, text,
                                     ours, theirs, create_time)
        SELECT u.id, u.kind, u.subject, u.reference, u.checkout_id, u.seller, u.psp, u.event, u.text, u.ours, u.theirs, p_now
        FROM jsonb_to_recordset(p -> 'findings')
            AS u(id text, kind smallint, subject smallint, reference text, checkout_id text, seller text, psp text, event text,
                 text text, ours jsonb, theirs jsonb)
        ORDER BY u.id
        ON CONFLICT DO NOTHING;
        PERFORM payment.renew_attention(u.subject, u.reference)
        FROM jsonb_to_recordset(p -> 'findings') AS u(subject smallint, reference text);
    END IF;
    RETURN has_parked;
END $$;

-- `attention` is the newest open text, or empty.
CREATE FUNCTION payment.renew_attention(p_subject smallint, p_reference text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    newest text;
BEGIN
    SELECT text INTO newest FROM payment.finding
    WHERE subject = p_subject AND reference = p_reference AND resolve_time IS NULL
    ORDER BY create_time DESC, finding_id DESC LIMIT 1;
    IF p_subject = 1 THEN
        UPDATE payment.payment_order SET attention = coalesce(newest, '')
        WHERE payment_order_id = p_reference AND attention <> coalesce(newest, '');
    ELSIF p_subject = 2 THEN
        UPDATE payment.payout SET attention = coalesce(newest, '')
        WHERE reference = p_reference AND attention <> coalesce(newest, '');
    END IF;
END $$;

-- Resolves a finding where it is open, and tells whether it was. The order or payout gets a new revision: a decision that was
-- made on its old `attention` is made again.
CREATE FUNCTION payment.resolve_finding(
    p_finding_id text, p_now timestamptz, p_resolved_by text, p_reason text, p_request_id text
) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    f payment.finding;
BEGIN
    UPDATE payment.finding SET resolve_time = p_now, resolved_by = p_resolved_by, reason = p_reason, request_id = p_request_id
    WHERE finding_id = p_finding_id AND resolve_time IS NULL RETURNING * INTO f;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF f.subject = 1 THEN
        UPDATE payment.payment_order SET revision = revision + 1, update_time = p_now WHERE payment_order_id = f.reference;
    ELSIF f.subject = 2 THEN
        UPDATE payment.payout SET revision = revision + 1, update_time = p_now WHERE reference = f.reference;
    END IF;
    PERFORM payment.renew_attention(f.subject, f.reference);
    RETURN true;
END $$;

-- migrate:down
DROP FUNCTION payment.resolve_finding;
DROP FUNCTION payment.apply_rare;
DROP FUNCTION payment.renew_attention;
ALTER TABLE payment.refund DROP CONSTRAINT refund_held, DROP COLUMN checkout_id, DROP COLUMN seller_account, DROP COLUMN booking,
    DROP COLUMN hold_count, DROP COLUMN held_minor, DROP COLUMN made_at_psp;
ALTER TABLE payment.payment_order DROP COLUMN disputed_minor;
DROP TABLE payment.finding;
DROP FUNCTION payment.create_payment(text, bytea, text, text, text, timestamptz, timestamptz, text, jsonb, jsonb, text);
ALTER TABLE payment.payment_event DROP COLUMN page_key;
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
