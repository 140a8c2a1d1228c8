-- migrate:up
-- The place of an entry's event in the feed payment.events, so that the ledger's balances can be told as of the events that the wallet has
-- applied (ledger/domain/comparison.py). NULL: written by a version that did not know it.
ALTER TABLE ledger.journal_entry ADD COLUMN feed_position bigint;
CREATE INDEX journal_entry_feed_position ON ledger.journal_entry (feed_position) WHERE feed_position IS NOT NULL;
-- Pages of names in the order of the wallet's directory.
CREATE INDEX account_name_by_code_point ON ledger.account (name COLLATE "C");

-- migrate:down
DROP INDEX ledger.account_name_by_code_point;
ALTER TABLE ledger.journal_entry DROP COLUMN feed_position;
