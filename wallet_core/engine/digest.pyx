# What proves the state: the linear half of the digest from scratch, and sums. Included by _engine.pyx.

cdef uint64_t linear_from_accounts(const EngineState* e) noexcept nogil:
    cdef uint64_t i
    cdef uint64_t linear = 0
    cdef const Account* a
    for i in range(e.account_count):
        a = &e.accounts[i]
        linear += (<uint64_t> a.balance * du_weight_balance(i) + <uint64_t> a.held_out * du_weight_held_out(i)
                   + <uint64_t> a.held_in * du_weight_held_in(i) + account_attributes(a) * du_weight_attributes(i))
    return linear


cdef uint32_t totals_scan(const EngineState* e, CurrencyTotal* out, uint32_t capacity) noexcept nogil:
    cdef uint64_t i
    cdef uint32_t count = 0, at = 0
    cdef uint32_t beyond = 0
    cdef const Account* a
    for i in range(e.account_count):
        a = &e.accounts[i]
        if at >= count or out[at].currency != a.currency:
            at = 0
            while at < count and out[at].currency != a.currency:
                at += 1
            if at == count:
                if count == capacity:
                    beyond += 1         # an upper bound of what is missing; the caller asks again with more
                    continue
                memset(&out[at], 0, sizeof(CurrencyTotal))
                out[at].currency = a.currency
                count += 1
        if a.flags & IN_FLIGHT_ACCOUNT:
            out[at].in_flight = a.balance
        else:
            out[at].accounts += 1
            # sums wrap, which only unsigned ones may
            out[at].balance = <int64_t> (<uint64_t> out[at].balance + <uint64_t> a.balance)
            out[at].held_out = <int64_t> (<uint64_t> out[at].held_out + <uint64_t> a.held_out)
            out[at].held_in = <int64_t> (<uint64_t> out[at].held_in + <uint64_t> a.held_in)
    return count + min(beyond, <uint32_t> 1)
