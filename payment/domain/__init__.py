"""What a payment, a refund and a payout are. Pure: time and ids are arguments."""
