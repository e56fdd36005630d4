#if DSP_S
/* n codes, a multiple of 4, as 16 bits; each 4 step after those before. */
static inline void spread_s8_S(int16_t *column, int32_t step, const int8_t *codes, int32_t n)
{
    for (const int8_t *end = codes + n; codes < end; codes += 4, column += step) {
        word_t *to = (word_t *)(void *)column;
        const uint32_t four = word(codes);
        to[0] = even_bytes(four);
        to[1] = odd_bytes(four);
    }
}
#endif
