/* R3: a rounding doubling high multiplication (ties up), then a right shift with ties up. */
static inline int32_t rescale_R3(int32_t sum, int32_t multiplier, int32_t shift)
{
    const int32_t left = shift > 0 ? shift : 0, right = shift > 0 ? 0 : -shift;
    const int64_t high = ((int64_t)sum * ((int64_t)1 << left) * multiplier + (1 << 30)) >> 31;
    return (int32_t)((high + (((int64_t)1 << right) >> 1)) >> right);
}
