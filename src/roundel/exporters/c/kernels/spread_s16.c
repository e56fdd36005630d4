#if DSP_S
/* n codes as 16 bits from code k of a column on; k and n are multiples of 4. */
static void spread_s16_S(int16_t *column, int32_t k, const int16_t *codes, int32_t n)
{
    for (int16_t *to = column + 2 * k; n > 0; n -= 4, codes += 4, to += 8) {
        to[0] = codes[0];
        to[1] = codes[2];
        to[2] = codes[1];
        to[3] = codes[3];
    }
}
#endif
