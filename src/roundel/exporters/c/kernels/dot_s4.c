/* 4 bytes hold 8 weights of int4, the lower halves the first 4. */
#if DSP_S
/* Two rows of weights, next bytes apart, by two columns; the
 * sums are 16 times too large, since weights stay in the upper bits. */
static inline void tiles_s4(const struct product *a, int32_t o, const int8_t *weight, int32_t next, const void *columns, int32_t sum[4])
{
    const word_t *row = (const word_t *)(const void *)weight, *end = row + a->stride / 4;
    const words_t *codes = columns;
    const uint32_t upper = 0xF0F0F0F0u;
    (void)o;
    next /= 4;
    for (; row < end; row++) {
        const uint32_t w = row[0], v = row[next];
        codes = tile((w << 4) & upper, (v << 4) & upper, codes, sum);
        codes = tile(w & upper, v & upper, codes, sum);
    }
}

static inline void begin_s4(const struct product *a, void *scratch)
{
    (void)a, (void)scratch;
}

static inline int32_t scaled_s4(int32_t sum)
{
    return sum >> 4;
}
#endif

#if !DSP_S
/* Sum of depth products of codes by weights. */
static S dot_X_S_s4(const struct product *a, int32_t row, const X *x)
{
    const int8_t *weight = a->weight + row * a->stride;
    const int32_t depth = a->depth;
    S sum = 0;
    for (int32_t i = 0; i < depth; i += 8, weight += 4) {
        for (int32_t j = 0; j < 8 && i + j < depth; j++) {
            const int32_t code = (weight[j & 3] >> (j & 4)) & 15;
            sum += x[i + j] * (code - ((code & 8) << 1));
        }
    }
    return sum;
}
#endif
