#if DSP_S
/* n codes, a multiple of 4, as 16 bits; each 4 step after those before. */
static inline void spread_s16_S(int16_t *to, int32_t step, const int16_t *codes, int32_t n)
{
    for (; n > 0; n -= 4, codes += 4, to += step) {
        to[0] = codes[0];
        to[1] = codes[2];
        to[2] = codes[1];
        to[3] = codes[3];
    }
}
#endif
