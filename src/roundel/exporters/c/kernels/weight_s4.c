/* Weight i of a row. */
static inline int32_t weight_s4(const int8_t *row, const int16_t *levels, int32_t i)
{
    const int32_t code = (row[(i >> 3 << 2) + (i & 3)] >> (i & 4)) & 15;
    (void)levels;
    return code - ((code & 8) << 1);
}
