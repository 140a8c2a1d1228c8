// Creates a payment and watches it, sends 100,000 transfers as columns, and decodes the details of an error.
//
// Exit code 0 means that everything came out as it should. See ../README.md.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"github.com/google/uuid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	commonv1 "ducat-example/gen/ducat/common/v1"
	paymentv1 "ducat-example/gen/ducat/payment/v1"
	walletv1 "ducat-example/gen/ducat/wallet/v1"
)

//go:generate buf generate

const (
	transferCount = 100_000
	rowCountMax   = 8_190 // rows that one TransferBatch may have
	runTimeout    = 2 * time.Minute
	watchTimeout  = 30 * time.Second
)

// accountNamespace and the test vector below are those of Account.account_id in ducat/wallet/v1/wallet.proto.
var accountNamespace = uuid.MustParse("5c2a2c1e-6f0b-5d3b-9d5e-0b1f7a4c9e21")

// run is part of every id, so that the program can run again and again.
var run = "example-go-" + uuid.NewString()[:13]

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), runTimeout)
	defer cancel()
	if token := os.Getenv("DUCAT_AUTH_TOKEN"); token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	payments := paymentv1.NewPaymentServiceClient(dial("DUCAT_PAYMENT_ADDRESS", "127.0.0.1:50051"))
	wallet := walletv1.NewWalletServiceClient(dial("DUCAT_WALLET_ADDRESS", "127.0.0.1:50053"))
	for at, part := range []func() error{
		func() error { return createAndWatch(ctx, payments) },
		func() error { return submitTransfers(ctx, wallet) },
		func() error { return readError(ctx, payments) },
	} {
		if err := part(); err != nil {
			log.Fatalf("part %d: %v", at+1, err)
		}
	}
}

// dial opens no connection yet: the first call does. Beyond loopback, use credentials.NewTLS: the token is a secret.
func dial(variable, address string) *grpc.ClientConn {
	if given := os.Getenv(variable); given != "" {
		address = given
	}
	connection, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatalf("%s: %v", address, err)
	}
	return connection
}

// payment asks for one order of 75.00 of a currency with two decimals. The checkout id is the idempotency key: sent again with the same
// content, it creates nothing new.
func payment(checkoutID, currencyCode string) *paymentv1.CreatePaymentRequest {
	return &paymentv1.CreatePaymentRequest{
		CheckoutId: checkoutID,
		BuyerInfo:  &paymentv1.BuyerInfo{BuyerId: "BUYER-1"},
		PaymentOrders: []*paymentv1.PaymentOrderSpec{{
			PaymentOrderId: checkoutID + "-order",
			SellerAccount:  "SELL-1",
			Amount:         &commonv1.Money{CurrencyCode: currencyCode, AmountMinor: 7500},
		}},
	}
}

// createAndWatch makes a payment that nobody pays: the program cancels it, and the stream ends because it is done.
func createAndWatch(ctx context.Context, payments paymentv1.PaymentServiceClient) error {
	ctx, cancel := context.WithTimeout(ctx, watchTimeout)
	defer cancel()
	created, err := payments.CreatePayment(ctx, payment(run, "USD"))
	if err != nil {
		return err
	}
	fmt.Printf("payment %s: the buyer pays at %s\n", run, created.Payment.CheckoutUrl)
	changes, err := payments.WatchPayment(ctx, &paymentv1.WatchPaymentRequest{CheckoutId: run})
	if err != nil {
		return err
	}
	var state paymentv1.PaymentOrderState
	for isCanceled := false; ; {
		change, err := changes.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		state = change.Payment.PaymentOrders[0].State
		fmt.Printf("payment %s: %v\n", run, state)
		if !isCanceled {
			if _, err := payments.CancelPayment(ctx, &paymentv1.CancelPaymentRequest{CheckoutId: run, Reason: "example"}); err != nil {
				return err
			}
			isCanceled = true
		}
	}
	if state != paymentv1.PaymentOrderState_PAYMENT_ORDER_STATE_CANCELED {
		return fmt.Errorf("expected the order to be CANCELED, it is %v", state)
	}
	return nil
}

// submitTransfers moves money from one account to another, 8,190 rows a message, all on one stream.
func submitTransfers(ctx context.Context, wallet walletv1.WalletServiceClient) error {
	if id := accountID("seller/SELL-XYZ-1/USD").String(); id != "966741c5-a471-5827-a8ed-45db1b337188" {
		return fmt.Errorf("the rule of account ids is broken: %s", id)
	}
	sourceName, targetName := "example/"+run+"/source", "example/"+run+"/target"
	source, target := accountID(sourceName), accountID(targetName)
	opened, err := wallet.CreateAccounts(ctx, &walletv1.CreateAccountsRequest{Accounts: []*walletv1.AccountSpec{
		{AccountId: source[:], Name: sourceName, CurrencyCode: "USD", MayOverdraw: true},
		{AccountId: target[:], Name: targetName, CurrencyCode: "USD"},
	}})
	if err != nil {
		return err
	}
	for _, result := range opened.Results {
		if result != walletv1.AccountResult_ACCOUNT_RESULT_OK {
			return fmt.Errorf("an account was not opened: %v", result)
		}
	}

	begin := time.Now()
	stream, err := wallet.SubmitTransfers(ctx)
	if err != nil {
		return err
	}
	sum := int64(0)
	sent := make(chan error, 1)
	go func() { // while answers come: the server reads only so far ahead
		for first := 0; first < transferCount; first += rowCountMax {
			batch := transferBatch(first, min(rowCountMax, transferCount-first), source, target)
			for _, amount := range batch.AmountsMinor {
				sum += amount
			}
			if err := stream.Send(&walletv1.SubmitTransfersRequest{Batch: batch}); err != nil {
				sent <- nil // Recv says why
				return
			}
		}
		sent <- stream.CloseSend()
	}()
	rowCount := uint32(0)
	for {
		answer, err := stream.Recv() // in any order: BatchId says which
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if failed := answer.Result.FailedRows; len(failed) > 0 {
			why := walletv1.TransferResult(answer.Result.FailedResults[0])
			return fmt.Errorf("batch %d: %d rows failed, row %d: %v", answer.Result.BatchId, len(failed), failed[0], why)
		}
		rowCount += answer.Result.RowCount
	}
	if err := <-sent; err != nil {
		return err
	}
	seconds := time.Since(begin).Seconds()
	if rowCount != transferCount {
		return fmt.Errorf("expected answers for %d transfers, got %d", transferCount, rowCount)
	}
	fmt.Printf("%d transfers in %.2f s: %.0f a second, all durable\n", transferCount, seconds, transferCount/seconds)

	got, err := wallet.GetAccounts(ctx, &walletv1.GetAccountsRequest{AccountIds: [][]byte{source[:], target[:]}})
	if err != nil {
		return err
	}
	for _, account := range got.Accounts {
		fmt.Printf("balance of %s: %d\n", account.Name, account.BalanceMinor)
	}
	if a := got.Accounts; len(a) != 2 || a[0].BalanceMinor != -sum || a[1].BalanceMinor != sum {
		return fmt.Errorf("expected balances of %d and %d", -sum, sum)
	}
	return nil
}

func accountID(name string) uuid.UUID { return uuid.NewSHA1(accountNamespace, []byte(name)) }

// transferBatch makes the columns of some rows: 16 bytes an id, one after the other.
func transferBatch(first, rows int, source, target uuid.UUID) *walletv1.TransferBatch {
	batch := &walletv1.TransferBatch{
		BatchId:          uint64(first),
		Ids:              make([]byte, 0, 16*rows),
		DebitAccountIds:  bytes.Repeat(source[:], rows),
		CreditAccountIds: bytes.Repeat(target[:], rows),
		AmountsMinor:     make([]int64, rows),
	}
	for row := range rows {
		id := uuid.Must(uuid.NewV7())
		batch.Ids = append(batch.Ids, id[:]...)
		batch.AmountsMinor[row] = int64(1 + (first+row)%100)
	}
	return batch
}

// readError decodes what comes in grpc-status-details-bin: status.Details does it.
func readError(ctx context.Context, payments paymentv1.PaymentServiceClient) error {
	_, err := payments.CreatePayment(ctx, payment(run+"-bad", "dollars"))
	var reason, field string
	for _, detail := range status.Convert(err).Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			reason = detail.Reason
		case *errdetails.BadRequest:
			for _, violation := range detail.FieldViolations {
				field = violation.Field
				fmt.Printf("refused: %s: %s\n", field, violation.Description)
			}
		}
	}
	fmt.Printf("refused: %s, %s\n", reason, field)
	if reason != "INVALID_ARGUMENT" || field != "payment_orders[0].amount.currency_code" {
		return fmt.Errorf("expected INVALID_ARGUMENT for the currency code, got %v", err)
	}
	return nil
}
