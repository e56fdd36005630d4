/* Weight i of a row. */
static inline int32_t weight_c4(const int8_t *row, const int16_t *levels, int32_t i)
{
    return levels[(row[(i >> 2 << 1) + (i & 1)] >> ((i & 2) << 1)) & 15];
}
