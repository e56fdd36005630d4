#if defined(__GNUC__)
#define RARE __attribute__((noinline, cold))
#else
#define RARE
#endif

/* R2 where the bit that rounds lies in the lower word. */
static RARE int32_t rescale_far_R2(int64_t product, int32_t shift)
{
    return (int32_t)((product + ((int64_t)1 << (30 - shift))) >> (31 - shift));
}

/* R2: one multiplication in 64 bits and one shift, ties up. */
static inline int32_t rescale_R2(int32_t sum, int32_t multiplier, int32_t shift)
{
    const int64_t product = (int64_t)sum * multiplier;
    if (shift > -2) {
        return rescale_far_R2(product, shift);
    }
    return (((int32_t)(product >> 32) >> (-2 - shift)) + 1) >> 1;
}
