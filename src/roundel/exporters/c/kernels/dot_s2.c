/* 4 bytes hold 16 weights of int2, the lowest two bits of each the first 4. */
#if DSP_S
/* Two rows of weights, next bytes apart, by two columns; the
 * sums are 64 times too large, since weights stay in the upper bits. */
static inline void tiles_s2(const struct product *a, int32_t o, const int8_t *weight, int32_t next, const void *columns, int32_t sum[4])
{
    const word_t *row = (const word_t *)(const void *)weight, *end = row + a->stride / 4;
    const words_t *codes = columns;
    const uint32_t upper = 0xC0C0C0C0u;
    (void)o;
    next /= 4;
    for (; row < end; row++) {
        const uint32_t w = row[0], v = row[next];
        codes = tile((w << 6) & upper, (v << 6) & upper, codes, sum);
        codes = tile((w << 4) & upper, (v << 4) & upper, codes, sum);
        codes = tile((w << 2) & upper, (v << 2) & upper, codes, sum);
        codes = tile(w & upper, v & upper, codes, sum);
    }
}

static inline void begin_s2(const struct product *a, void *scratch)
{
    (void)a, (void)scratch;
}

static inline int32_t scaled_s2(int32_t sum)
{
    return sum >> 6;
}
#endif

#if !DSP_S
/* Sum of depth products of codes by weights. */
static S dot_X_S_s2(const struct product *a, int32_t row, const X *x)
{
    const int8_t *weight = a->weight + row * a->stride;
    const int32_t depth = a->depth;
    S sum = 0;
    for (int32_t i = 0; i < depth; i += 16, weight += 4) {
        for (int32_t j = 0; j < 16 && i + j < depth; j++) {
            const int32_t code = (weight[j & 3] >> (j >> 2 << 1)) & 3;
            sum += x[i + j] * (code - ((code & 2) << 1));
        }
    }
    return sum;
}
#endif
