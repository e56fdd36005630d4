/* R2 on sums of up to 2^47: a multiplier of 15 bits, one product in 64, ties up. */
static inline int64_t rescale_wide(int64_t sum, int32_t multiplier, int32_t shift)
{
    return (sum * multiplier + ((int64_t)1 << (30 - shift))) >> (31 - shift);
}
