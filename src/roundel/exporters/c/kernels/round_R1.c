/* R1, gemmlowp: a rounding doubling high multiplication (ties up), then a right shift with ties away from zero. */
static inline int32_t rescale_R1(int32_t sum, int32_t multiplier, int32_t shift)
{
    const int32_t left = shift > 0 ? shift : 0, right = shift > 0 ? 0 : -shift;
    const int32_t high = (int32_t)(((int64_t)sum * ((int64_t)1 << left) * multiplier + (1 << 30)) >> 31);
    const int32_t ones = (int32_t)(((uint32_t)1 << right) - 1u);
    return (high >> right) + ((high & ones) > (ones >> 1) + (high < 0));
}
