/* R2a: one multiplication in 64 bits and one shift, ties away from zero. */
static inline int32_t rescale_R2a(int32_t sum, int32_t multiplier, int32_t shift)
{
    const int64_t product = (int64_t)sum * multiplier, half = (int64_t)1 << (30 - shift);
    return (int32_t)(product < 0 ? -((half - product) >> (31 - shift)) : (half + product) >> (31 - shift));
}
