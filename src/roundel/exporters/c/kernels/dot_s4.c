/* 4 bytes hold 8 weights of int4, the lower halves the first 4. */
#if DSP_S
#define ROWS_s4 2
#define COLUMNS_s4 2

/* Rows o and o + next of weights by two columns; the
 * sums are 16 times too large, since weights stay in the upper bits. */
static APART void tiles_s4(const struct product *a, int32_t o, int32_t next, const words_t *codes, int32_t out[4])
{
    int32_t sum[4] = {0, 0, 0, 0}; /* in registers */
    const int8_t *weight = a->weight + o * a->stride, *end = weight + a->stride;
    const uint32_t upper = 0xF0F0F0F0u;
    next *= a->stride;
    for (; weight < end; weight += 4) {
        const uint32_t w = word(weight), v = word(weight + next);
        codes = tile((w << 4) & upper, (v << 4) & upper, codes, sum);
        codes = tile(w & upper, v & upper, codes, sum);
    }
    out[0] = sum[0], out[1] = sum[1], out[2] = sum[2], out[3] = sum[3];
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
