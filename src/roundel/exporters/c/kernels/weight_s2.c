/* Weight i of a row. */
static inline int32_t weight_s2(const int8_t *row, const int16_t *levels, int32_t i)
{
    const int32_t code = (row[(i >> 4 << 2) + (i & 3)] >> (i >> 1 & 6)) & 3;
    (void)levels;
    return code - ((code & 2) << 1);
}
