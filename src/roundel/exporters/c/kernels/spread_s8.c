#if DSP_S
/* n codes as 16 bits from code k of a column on; k and n are multiples of 4. */
static void spread_s8_S(int16_t *column, int32_t k, const int8_t *codes, int32_t n)
{
    word_t *to = (word_t *)(void *)(column + 2 * k);
    for (const int8_t *end = codes + n; codes < end; codes += 4, to += 4) {
        const uint32_t word = *(const word_t *)(const void *)codes;
        to[0] = even_bytes(word);
        to[1] = odd_bytes(word);
    }
}
#endif
