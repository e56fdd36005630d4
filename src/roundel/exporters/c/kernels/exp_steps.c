#include "multiply_high.c"

/* exp(-units * 2^-16) in Q0.31 by a table in three steps of 7 bits. */
static int32_t exp_steps(const int32_t *table, int32_t units)
{
    const int32_t high = multiply_high(table[units >> 14], table[128 + ((units >> 7) & 127)]);
    return multiply_high(high, table[256 + (units & 127)]);
}
