package example;

import static java.util.concurrent.TimeUnit.SECONDS;

import com.google.protobuf.ByteString;
import com.google.protobuf.Message;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import ducat.common.v1.Money;
import ducat.payment.v1.*;
import ducat.wallet.v1.*;
import io.grpc.CallOptions;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.MethodDescriptor.MethodType;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.ProtoUtils;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.ClientCalls;
import io.grpc.stub.MetadataUtils;
import java.nio.ByteBuffer;
import java.security.MessageDigest;
import java.security.SecureRandom;
import java.util.List;
import java.util.UUID;
import java.util.concurrent.CompletableFuture;

/**
 * Creates a payment and watches it, sends 100,000 transfers as columns, and decodes the details of an error.
 *
 * <p>Exit code 0 means that everything came out as it should. See ../README.md.
 */
public final class Main {
  private static final int TRANSFER_COUNT = 100_000;
  /** Rows that one TransferBatch may have. */
  private static final int ROW_COUNT_MAX = 8_190;
  /** Of Account.account_id in ducat/wallet/v1/wallet.proto. */
  private static final UUID ACCOUNT_NAMESPACE = UUID.fromString("5c2a2c1e-6f0b-5d3b-9d5e-0b1f7a4c9e21");
  /** Part of every id, so that the program can run again and again. */
  private static final String RUN = "example-java-" + UUID.randomUUID().toString().substring(0, 13);
  private static final SecureRandom RANDOM = new SecureRandom();

  // The methods that are called here; protoc-gen-grpc-java writes all of them, where you have it.
  private static final MethodDescriptor<CreatePaymentRequest, CreatePaymentResponse> CREATE_PAYMENT =
      method("ducat.payment.v1.PaymentService/CreatePayment", MethodType.UNARY,
          CreatePaymentRequest.getDefaultInstance(), CreatePaymentResponse.getDefaultInstance());
  private static final MethodDescriptor<CancelPaymentRequest, CancelPaymentResponse> CANCEL_PAYMENT =
      method("ducat.payment.v1.PaymentService/CancelPayment", MethodType.UNARY,
          CancelPaymentRequest.getDefaultInstance(), CancelPaymentResponse.getDefaultInstance());
  private static final MethodDescriptor<WatchPaymentRequest, WatchPaymentResponse> WATCH_PAYMENT =
      method("ducat.payment.v1.PaymentService/WatchPayment", MethodType.SERVER_STREAMING,
          WatchPaymentRequest.getDefaultInstance(), WatchPaymentResponse.getDefaultInstance());
  private static final MethodDescriptor<CreateAccountsRequest, CreateAccountsResponse> CREATE_ACCOUNTS =
      method("ducat.wallet.v1.WalletService/CreateAccounts", MethodType.UNARY,
          CreateAccountsRequest.getDefaultInstance(), CreateAccountsResponse.getDefaultInstance());
  private static final MethodDescriptor<GetAccountsRequest, GetAccountsResponse> GET_ACCOUNTS =
      method("ducat.wallet.v1.WalletService/GetAccounts", MethodType.UNARY,
          GetAccountsRequest.getDefaultInstance(), GetAccountsResponse.getDefaultInstance());
  private static final MethodDescriptor<SubmitTransfersRequest, SubmitTransfersResponse> SUBMIT_TRANSFERS =
      method("ducat.wallet.v1.WalletService/SubmitTransfers", MethodType.BIDI_STREAMING,
          SubmitTransfersRequest.getDefaultInstance(), SubmitTransfersResponse.getDefaultInstance());

  public static void main(String[] arguments) throws Exception {
    ManagedChannel payments = connect("DUCAT_PAYMENT_ADDRESS", "127.0.0.1:50051");
    ManagedChannel wallet = connect("DUCAT_WALLET_ADDRESS", "127.0.0.1:50053");
    try {
      createAndWatch(payments);
      submitTransfers(wallet);
      readError(payments);
    } finally {
      payments.shutdownNow().awaitTermination(5, SECONDS);
      wallet.shutdownNow().awaitTermination(5, SECONDS);
    }
  }

  /** Beyond loopback, leave out usePlaintext(): the token is a secret. */
  private static ManagedChannel connect(String variable, String address) {
    String token = System.getenv().getOrDefault("DUCAT_AUTH_TOKEN", "");
    Metadata metadata = new Metadata();
    if (!token.isEmpty()) {
      metadata.put(Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER), "Bearer " + token);
    }
    return ManagedChannelBuilder.forTarget(System.getenv().getOrDefault(variable, address))
        .usePlaintext()
        .intercept(MetadataUtils.newAttachHeadersInterceptor(metadata))
        .build();
  }

  private static <Q extends Message, A extends Message> MethodDescriptor<Q, A> method(
      String name, MethodType type, Q request, A response) {
    return MethodDescriptor.<Q, A>newBuilder(ProtoUtils.marshaller(request), ProtoUtils.marshaller(response))
        .setType(type)
        .setFullMethodName(name)
        .build();
  }

  private static CallOptions within(int seconds) {
    return CallOptions.DEFAULT.withDeadlineAfter(seconds, SECONDS);
  }

  /**
   * One order of 75.00 of a currency with two decimals. The checkout_id is the idempotency key: sent again with the
   * same content, this creates nothing new.
   */
  private static CreatePaymentRequest payment(String checkoutId, String currencyCode) {
    return CreatePaymentRequest.newBuilder()
        .setCheckoutId(checkoutId)
        .setBuyerInfo(BuyerInfo.newBuilder().setBuyerId("BUYER-1"))
        .addPaymentOrders(PaymentOrderSpec.newBuilder()
            .setPaymentOrderId(checkoutId + "-order")
            .setSellerAccount("SELL-1")
            .setAmount(Money.newBuilder().setCurrencyCode(currencyCode).setAmountMinor(7500)))
        .build();
  }

  /** A payment that nobody pays: the program cancels it, and the stream ends because it is done. */
  private static void createAndWatch(ManagedChannel channel) {
    var created = ClientCalls.blockingUnaryCall(channel, CREATE_PAYMENT, within(10), payment(RUN, "USD"));
    System.out.printf("payment %s: the buyer pays at %s%n", RUN, created.getPayment().getCheckoutUrl());
    var state = PaymentOrderState.PAYMENT_ORDER_STATE_UNSPECIFIED;
    boolean isCanceled = false;
    var watch = WatchPaymentRequest.newBuilder().setCheckoutId(RUN).build();
    var changes = ClientCalls.blockingServerStreamingCall(channel, WATCH_PAYMENT, within(30), watch);
    while (changes.hasNext()) {
      state = changes.next().getPayment().getPaymentOrders(0).getState();
      System.out.printf("payment %s: %s%n", RUN, state);
      if (!isCanceled) {
        var cancel = CancelPaymentRequest.newBuilder().setCheckoutId(RUN).setReason("example").build();
        ClientCalls.blockingUnaryCall(channel, CANCEL_PAYMENT, within(10), cancel);
        isCanceled = true;
      }
    }
    check("state of the order", PaymentOrderState.PAYMENT_ORDER_STATE_CANCELED, state);
  }

  /** From one account to another, 8,190 rows a message, all on one stream. */
  private static void submitTransfers(ManagedChannel channel) throws Exception {
    ByteString vector = accountId("seller/SELL-XYZ-1/USD"); // the test vector of the proto
    check("id of an account", bytes(UUID.fromString("966741c5-a471-5827-a8ed-45db1b337188")), vector);
    String sourceName = "example/" + RUN + "/source";
    String targetName = "example/" + RUN + "/target";
    ByteString source = accountId(sourceName);
    ByteString target = accountId(targetName);
    var accounts = CreateAccountsRequest.newBuilder()
        .addAccounts(AccountSpec.newBuilder()
            .setAccountId(source).setName(sourceName).setCurrencyCode("USD").setMayOverdraw(true))
        .addAccounts(AccountSpec.newBuilder().setAccountId(target).setName(targetName).setCurrencyCode("USD"))
        .build();
    var opened = ClientCalls.blockingUnaryCall(channel, CREATE_ACCOUNTS, within(10), accounts).getResultsList();
    check("opened accounts", List.of(AccountResult.ACCOUNT_RESULT_OK, AccountResult.ACCOUNT_RESULT_OK), opened);

    long begin = System.nanoTime();
    var stream = ClientCalls.blockingBidiStreamingCall(channel, SUBMIT_TRANSFERS, within(60));
    // Sent while answers come, for the server reads only so far ahead: write() waits then.
    CompletableFuture<Long> sent = CompletableFuture.supplyAsync(() -> {
      long sum = 0;
      try {
        for (int first = 0; first < TRANSFER_COUNT; first += ROW_COUNT_MAX) {
          var batch = transferBatch(first, Math.min(ROW_COUNT_MAX, TRANSFER_COUNT - first), source, target);
          sum += batch.getAmountsMinorList().stream().mapToLong(Long::longValue).sum();
          stream.write(SubmitTransfersRequest.newBuilder().setBatch(batch).build());
        }
        stream.halfClose();
      } catch (Exception error) {
        stream.cancel("the sender failed", error); // read() throws it
      }
      return sum;
    });
    int rowCount = 0;
    for (var answer = stream.read(); answer != null; answer = stream.read()) { // in any order: batch_id says which
      var result = answer.getResult();
      check("failed rows of batch " + result.getBatchId(), List.of(), result.getFailedRowsList());
      rowCount += result.getRowCount();
    }
    long sum = sent.get();
    double seconds = (System.nanoTime() - begin) / 1e9;
    check("transfers", TRANSFER_COUNT, rowCount);
    System.out.printf(
        "%d transfers in %.2f s: %.0f a second, all durable%n", TRANSFER_COUNT, seconds, TRANSFER_COUNT / seconds);

    var both = GetAccountsRequest.newBuilder().addAccountIds(source).addAccountIds(target).build();
    var got = ClientCalls.blockingUnaryCall(channel, GET_ACCOUNTS, within(10), both).getAccountsList();
    got.forEach(account -> System.out.printf("balance of %s: %d%n", account.getName(), account.getBalanceMinor()));
    check("balances", List.of(-sum, sum), got.stream().map(Account::getBalanceMinor).toList());
  }

  /** The columns of some rows: 16 bytes an id, one after the other. */
  private static TransferBatch transferBatch(int first, int rows, ByteString source, ByteString target) {
    var ids = ByteBuffer.allocate(16 * rows);
    var debits = ByteBuffer.allocate(16 * rows);
    var credits = ByteBuffer.allocate(16 * rows);
    var batch = TransferBatch.newBuilder().setBatchId(first);
    for (int row = 0; row < rows; row++) {
      // UUIDv7 (RFC 9562 §5.7): 48 bits of unix milliseconds, the version, random bits with the variant among them.
      ids.putLong(System.currentTimeMillis() << 16 | 0x7000 | RANDOM.nextInt(0x1000));
      ids.putLong(RANDOM.nextLong() >>> 2 | 0x8000000000000000L);
      source.copyTo(debits);
      target.copyTo(credits);
      batch.addAmountsMinor(1 + (first + row) % 100);
    }
    return batch
        .setIds(ByteString.copyFrom(ids.flip()))
        .setDebitAccountIds(ByteString.copyFrom(debits.flip()))
        .setCreditAccountIds(ByteString.copyFrom(credits.flip()))
        .build();
  }

  /** UUIDv5 (RFC 9562 §5.5) of the name: java.util.UUID has version 3 only. */
  private static ByteString accountId(String name) throws Exception {
    MessageDigest sha1 = MessageDigest.getInstance("SHA-1");
    sha1.update(bytes(ACCOUNT_NAMESPACE).asReadOnlyByteBuffer());
    var digest = ByteBuffer.wrap(sha1.digest(name.getBytes("UTF-8")));
    long high = digest.getLong() & ~0xF000L | 0x5000L;
    long low = digest.getLong() & 0x3FFFFFFFFFFFFFFFL | 0x8000000000000000L;
    return bytes(new UUID(high, low));
  }

  private static ByteString bytes(UUID id) {
    var buffer = ByteBuffer.allocate(16).putLong(id.getMostSignificantBits()).putLong(id.getLeastSignificantBits());
    return ByteString.copyFrom(buffer.flip());
  }

  /** What comes in grpc-status-details-bin: a google.rpc.Status whose details are ErrorInfo and BadRequest. */
  private static void readError(ManagedChannel channel) throws Exception {
    String reason = "";
    String field = "";
    try {
      ClientCalls.blockingUnaryCall(channel, CREATE_PAYMENT, within(10), payment(RUN + "-bad", "dollars"));
    } catch (StatusRuntimeException error) {
      for (var detail : StatusProto.fromThrowable(error).getDetailsList()) {
        if (detail.is(ErrorInfo.class)) {
          reason = detail.unpack(ErrorInfo.class).getReason();
        } else if (detail.is(BadRequest.class)) {
          var violation = detail.unpack(BadRequest.class).getFieldViolations(0);
          field = violation.getField();
          System.out.printf("refused: %s: %s%n", field, violation.getDescription());
        }
      }
    }
    System.out.printf("refused: %s, %s%n", reason, field);
    check("reason", "INVALID_ARGUMENT", reason);
    check("field", "payment_orders[0].amount.currency_code", field);
  }

  private static void check(String what, Object expected, Object got) {
    if (!expected.equals(got)) {
      throw new IllegalStateException(what + ": expected " + expected + ", got " + got);
    }
  }
}
