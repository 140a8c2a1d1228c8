-- migrate:up
-- The unguessable part of the buyer's page: part of what is sent again, so that a repeated call is the same call.
ALTER TABLE executor.attempt ADD COLUMN page_key text NOT NULL DEFAULT '';

-- migrate:down
ALTER TABLE executor.attempt DROP COLUMN page_key;
