// Creates a payment and watches it, sends 100,000 transfers as columns, and decodes the details of an error.
//
// Exit code 0 means that everything came out as it should. See ../README.md.
import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { once } from "node:events";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";
import protobuf from "protobufjs";
import { stringify, v5, v7 } from "uuid";

const TRANSFER_COUNT = 100_000;
const ROW_COUNT_MAX = 8_190; // rows that one TransferBatch may have
const CALL_TIMEOUT_MS = 10_000;
const WATCH_TIMEOUT_MS = 30_000;
const SUBMIT_TIMEOUT_MS = 60_000;
// Of Account.account_id in ducat/wallet/v1/wallet.proto.
const ACCOUNT_NAMESPACE = "5c2a2c1e-6f0b-5d3b-9d5e-0b1f7a4c9e21";

// Part of every id, so that the program can run again and again.
const RUN = `example-node-${randomUUID().slice(0, 13)}`;

// The stubs are made from the protos when the program starts. Amounts are 64 bits wide: as strings they are read without loss.
const protos = fileURLToPath(new URL("../../proto", import.meta.url));
const { ducat } = grpc.loadPackageDefinition(
  protoLoader.loadSync(["ducat/payment/v1/payment_service.proto", "ducat/wallet/v1/wallet_service.proto"], {
    includeDirs: [protos, `${protos}/vendor`],
    keepCase: true,
    longs: String,
    enums: String,
    defaults: true,
  }),
);

// The part of google.rpc that errors use (google/rpc/status.proto and error_details.proto).
const rpc = protobuf.parse(`
  syntax = "proto3";
  package google.rpc;
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }
  message BadRequest {
    message FieldViolation { string field = 1; string description = 2; }
    repeated FieldViolation field_violations = 1;
  }`, { keepCase: true }).root;

const metadata = new grpc.Metadata();
if (process.env.DUCAT_AUTH_TOKEN) metadata.set("authorization", `Bearer ${process.env.DUCAT_AUTH_TOKEN}`);

// Beyond loopback, use grpc.credentials.createSsl(): the token is a secret.
const connect = (Service, variable, address) =>
  new Service(process.env[variable] || address, grpc.credentials.createInsecure());
const payments = connect(ducat.payment.v1.PaymentService, "DUCAT_PAYMENT_ADDRESS", "127.0.0.1:50051");
const wallet = connect(ducat.wallet.v1.WalletService, "DUCAT_WALLET_ADDRESS", "127.0.0.1:50053");

const within = (timeoutMs) => ({ deadline: Date.now() + timeoutMs });
// A unary call as a promise: call(payments, "GetPayment", {…}).
const call = (service, method, request) =>
  promisify(service[method]).call(service, request, metadata, within(CALL_TIMEOUT_MS));

// One order of 75.00 of a currency with two decimals. The checkout_id is the idempotency key: sent again with the same content, this
// creates nothing new.
const payment = (checkoutId, currencyCode) => ({
  checkout_id: checkoutId,
  buyer_info: { buyer_id: "BUYER-1" },
  payment_orders: [
    {
      payment_order_id: `${checkoutId}-order`,
      seller_account: "SELL-1",
      amount: { currency_code: currencyCode, amount_minor: 7500 },
    },
  ],
});

// A payment that nobody pays: the program cancels it, and the stream ends because it is done.
async function createAndWatch() {
  const created = await call(payments, "CreatePayment", payment(RUN, "USD"));
  console.log(`payment ${RUN}: the buyer pays at ${created.payment.checkout_url}`);
  let state;
  let isCanceled = false;
  for await (const change of payments.WatchPayment({ checkout_id: RUN }, metadata, within(WATCH_TIMEOUT_MS))) {
    state = change.payment.payment_orders[0].state;
    console.log(`payment ${RUN}: ${state}`);
    if (!isCanceled) {
      await call(payments, "CancelPayment", { checkout_id: RUN, reason: "example" });
      isCanceled = true;
    }
  }
  assert.equal(state, "PAYMENT_ORDER_STATE_CANCELED");
}

// 16 bytes: UUIDv5 of the name.
const accountId = (name) => v5(name, ACCOUNT_NAMESPACE, Buffer.alloc(16));

// From one account to another, 8,190 rows a message, all on one stream.
async function submitTransfers() {
  // The test vector of the proto.
  assert.equal(stringify(accountId("seller/SELL-XYZ-1/USD")), "966741c5-a471-5827-a8ed-45db1b337188");
  const names = [`example/${RUN}/source`, `example/${RUN}/target`];
  const [source, target] = names.map(accountId);
  const opened = await call(wallet, "CreateAccounts", {
    accounts: [
      { account_id: source, name: names[0], currency_code: "USD", may_overdraw: true },
      { account_id: target, name: names[1], currency_code: "USD" },
    ],
  });
  assert.deepEqual(opened.results, ["ACCOUNT_RESULT_OK", "ACCOUNT_RESULT_OK"]);

  const begin = performance.now();
  const stream = wallet.SubmitTransfers(metadata, within(SUBMIT_TIMEOUT_MS));
  const answered = countAnswers(stream);
  let sum = 0;
  for (let first = 0; first < TRANSFER_COUNT; first += ROW_COUNT_MAX) {
    const batch = transferBatch(first, Math.min(ROW_COUNT_MAX, TRANSFER_COUNT - first), source, target);
    for (const amount of batch.amounts_minor) sum += amount;
    // write() is false when the server does not read so fast: wait then, or the messages pile up in this process.
    if (!stream.write({ batch })) await Promise.race([once(stream, "drain"), answered]);
  }
  stream.end();
  assert.equal(await answered, TRANSFER_COUNT);
  const seconds = (performance.now() - begin) / 1000;
  const rate = Math.round(TRANSFER_COUNT / seconds);
  console.log(`${TRANSFER_COUNT} transfers in ${seconds.toFixed(2)} s: ${rate} a second, all durable`);

  const { accounts } = await call(wallet, "GetAccounts", { account_ids: [source, target] });
  for (const account of accounts) console.log(`balance of ${account.name}: ${account.balance_minor}`);
  assert.deepEqual(accounts.map((account) => account.balance_minor), [`${-sum}`, `${sum}`]);
}

// How many transfers were applied. Answers come in any order: batch_id says which.
async function countAnswers(stream) {
  let rowCount = 0;
  for await (const { result } of stream) {
    // Only what failed is listed: row numbers, and one byte a row that is its TransferResult.
    assert.deepEqual(result.failed_rows, [], `batch ${result.batch_id}: results ${[...result.failed_results].slice(0, 5)}`);
    rowCount += result.row_count;
  }
  return rowCount;
}

// The columns of some rows: 16 bytes an id, one after the other.
function transferBatch(first, rows, source, target) {
  const ids = Buffer.alloc(16 * rows);
  for (let row = 0; row < rows; row++) v7(undefined, ids, 16 * row);
  return {
    batch_id: first,
    ids,
    debit_account_ids: Buffer.alloc(16 * rows, source),
    credit_account_ids: Buffer.alloc(16 * rows, target),
    amounts_minor: Array.from({ length: rows }, (_, row) => 1 + ((first + row) % 100)),
  };
}

// What comes in grpc-status-details-bin: a google.rpc.Status whose details are ErrorInfo and BadRequest.
function detailsOf(error) {
  const found = { reason: "", violations: [] };
  const [raw] = error.metadata.get("grpc-status-details-bin");
  for (const { type_url: type, value } of raw ? rpc.lookupType("google.rpc.Status").decode(raw).details : []) {
    const detail = () => rpc.lookupType(type.split("/").at(-1)).decode(value);
    if (type.endsWith("/google.rpc.ErrorInfo")) found.reason = detail().reason;
    if (type.endsWith("/google.rpc.BadRequest")) found.violations.push(...detail().field_violations);
  }
  return found;
}

async function readError() {
  const refused = await call(payments, "CreatePayment", payment(`${RUN}-bad`, "dollars")).catch((error) => error);
  assert.equal(refused.code, grpc.status.INVALID_ARGUMENT);
  const { reason, violations } = detailsOf(refused);
  for (const { field, description } of violations) console.log(`refused: ${reason}, ${field}: ${description}`);
  assert.equal(reason, "INVALID_ARGUMENT");
  assert.deepEqual(violations.map(({ field }) => field), ["payment_orders[0].amount.currency_code"]);
}

try {
  await createAndWatch();
  await submitTransfers();
  await readError();
} catch (error) {
  console.error(error.message);
  process.exitCode = 1;
} finally {
  payments.close();
  wallet.close();
}
