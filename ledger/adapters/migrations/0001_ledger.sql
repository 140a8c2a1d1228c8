-- migrate:up
CREATE SCHEMA IF NOT EXISTS ledger;

-- kind: 1 asset, 2 liability, 3 revenue, 4 expense (ledger/domain/accounts.py). side: 1 debit, 2 credit.

CREATE TABLE ledger.account (
    name         text     PRIMARY KEY CHECK (length(name) BETWEEN 1 AND 200),
    kind         smallint NOT NULL CHECK (kind BETWEEN 1 AND 4),
    currency     text     NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    debit_minor  bigint   NOT NULL DEFAULT 0 CHECK (debit_minor >= 0),
    credit_minor bigint   NOT NULL DEFAULT 0 CHECK (credit_minor >= 0),
    create_time  timestamptz NOT NULL DEFAULT now(),
    update_time  timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 70);

CREATE TABLE ledger.journal_entry (
    id                 uuid     PRIMARY KEY,
    position           bigint   GENERATED ALWAYS AS IDENTITY UNIQUE,
    purpose            text     NOT NULL,
    merchant_reference text     NOT NULL,
    description        text     NOT NULL,
    posting_count      smallint NOT NULL CHECK (posting_count >= 2),
    content_digest     bytea    NOT NULL CHECK (length(content_digest) = 16),
    occur_time         timestamptz NOT NULL,
    create_time        timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX journal_entry_merchant_reference ON ledger.journal_entry (merchant_reference);

CREATE TABLE ledger.posting (
    entry_position bigint   NOT NULL,
    line           smallint NOT NULL CHECK (line >= 1),
    account        text     NOT NULL,
    currency       text     NOT NULL,
    side           smallint NOT NULL CHECK (side IN (1, 2)),
    amount_minor   bigint   NOT NULL CHECK (amount_minor > 0),
    occur_time     timestamptz NOT NULL,
    PRIMARY KEY (entry_position, line)
);
CREATE INDEX posting_account ON ledger.posting (account, occur_time, entry_position, line);

CREATE TABLE ledger.inbox (
    consumer    text NOT NULL,
    message_id  text NOT NULL,
    create_time timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer, message_id)
);
CREATE INDEX inbox_create_time ON ledger.inbox USING brin (create_time);

-- Double entry, held by the database itself. An entry, its postings and their accounts are written by one statement; these triggers
-- fire once at its end, over all its rows. A foreign key a row would say less (it cannot see balance) and cost more.
-- Lines are numbered 1 to posting_count, so nothing can be added to an entry later.

-- The look-ups are scalar subqueries, which stay on the index; as joins their plan, made while the tables are empty, is a scan.

CREATE FUNCTION ledger.check_postings() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    wrong text;
BEGIN
    SELECT string_agg(found.what, '; ') INTO wrong FROM (
        SELECT format('entry %s: debits − credits = %s %s', entry_position, debit_less_credit, currency) AS what
          FROM (SELECT entry_position, currency, sum(CASE side WHEN 1 THEN amount_minor ELSE -amount_minor END) AS debit_less_credit
                  FROM written GROUP BY entry_position, currency) AS w
         WHERE debit_less_credit <> 0
        UNION ALL
        SELECT format('entry %s: its postings must be written whole, with it, once', entry_position)
          FROM (SELECT entry_position, count(*) AS posting_count, max(line) AS line_max FROM written GROUP BY 1) AS w
         WHERE line_max <> posting_count
            OR (SELECT e.posting_count FROM ledger.journal_entry AS e WHERE e.position = entry_position)
               IS DISTINCT FROM posting_count
        UNION ALL
        SELECT format('account %s: unknown, or not in %s', account, currency)
          FROM (SELECT DISTINCT account, currency FROM written) AS w
         WHERE (SELECT a.currency FROM ledger.account AS a WHERE a.name = account) IS DISTINCT FROM currency
    ) AS found;
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION 'ledger: %', wrong USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $$;

CREATE FUNCTION ledger.check_entries() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    wrong text;
BEGIN
    SELECT string_agg(format('entry %s does not have its %s postings', id, posting_count), '; ') INTO wrong
      FROM written AS w
     WHERE (SELECT count(*) FROM ledger.posting WHERE entry_position = w.position) <> posting_count;
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION 'ledger: %', wrong USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $$;

CREATE FUNCTION ledger.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'ledger: % of %: the journal is append-only; correct it with a new entry', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'integrity_constraint_violation';
END $$;

CREATE TRIGGER posting_balanced AFTER INSERT ON ledger.posting
    REFERENCING NEW TABLE AS written FOR EACH STATEMENT EXECUTE FUNCTION ledger.check_postings();
CREATE TRIGGER journal_entry_whole AFTER INSERT ON ledger.journal_entry
    REFERENCING NEW TABLE AS written FOR EACH STATEMENT EXECUTE FUNCTION ledger.check_entries();
CREATE TRIGGER posting_append_only BEFORE UPDATE OR DELETE ON ledger.posting
    FOR EACH ROW EXECUTE FUNCTION ledger.refuse_change();
CREATE TRIGGER journal_entry_append_only BEFORE UPDATE OR DELETE ON ledger.journal_entry
    FOR EACH ROW EXECUTE FUNCTION ledger.refuse_change();
CREATE TRIGGER posting_no_truncate BEFORE TRUNCATE ON ledger.posting
    FOR EACH STATEMENT EXECUTE FUNCTION ledger.refuse_change();
CREATE TRIGGER journal_entry_no_truncate BEFORE TRUNCATE ON ledger.journal_entry
    FOR EACH STATEMENT EXECUTE FUNCTION ledger.refuse_change();

-- Reconciliation: what a PSP says it settled, line by line, and what did not match.

CREATE TABLE ledger.settlement_report (
    psp            text  NOT NULL,
    report_id      text  NOT NULL,
    content        bytea NOT NULL,
    content_digest bytea NOT NULL,
    line_count     integer NOT NULL DEFAULT 0,
    import_time    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (psp, report_id)
);

CREATE TABLE ledger.settlement_line (
    psp                text    NOT NULL,
    report_id          text    NOT NULL,
    line               integer NOT NULL CHECK (line >= 1),
    kind               text    NOT NULL,
    merchant_reference text    NOT NULL DEFAULT '',
    psp_object_id      text    NOT NULL DEFAULT '',
    currency           text    NOT NULL,
    amount_minor       bigint  NOT NULL,
    fee_minor          bigint  NOT NULL DEFAULT 0,
    occur_time         timestamptz,
    entry_position     bigint,
    PRIMARY KEY (psp, report_id, line),
    FOREIGN KEY (psp, report_id) REFERENCES ledger.settlement_report
);
CREATE INDEX settlement_line_merchant_reference ON ledger.settlement_line (merchant_reference);

CREATE TABLE ledger.break (
    id                  uuid   PRIMARY KEY,
    position            bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    psp                 text   NOT NULL,
    report_id           text   NOT NULL,
    line                integer,
    merchant_reference  text   NOT NULL DEFAULT '',
    ledger_currency     text,
    ledger_amount_minor bigint,
    psp_currency        text,
    psp_amount_minor    bigint,
    state               smallint NOT NULL DEFAULT 1 CHECK (state IN (1, 2)),
    description         text   NOT NULL,
    resolve_note        text   NOT NULL DEFAULT '',
    resolve_request_id  text   UNIQUE,
    create_time         timestamptz NOT NULL DEFAULT now(),
    resolve_time        timestamptz,
    FOREIGN KEY (psp, report_id) REFERENCES ledger.settlement_report
);
CREATE INDEX break_open ON ledger.break (psp, position) WHERE state = 1;

-- migrate:down
DROP TABLE ledger.break, ledger.settlement_line, ledger.settlement_report, ledger.inbox, ledger.posting, ledger.journal_entry, ledger.account;
DROP FUNCTION ledger.check_postings, ledger.check_entries, ledger.refuse_change;
