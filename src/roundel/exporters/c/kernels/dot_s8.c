#if DSP_S
#define ROWS_s8 2
#define COLUMNS_s8 2

/* Rows o and o + next of weights by two columns. */
static APART void tiles_s8(const struct product *a, int32_t o, int32_t next, const words_t *codes, int32_t out[4])
{
    int32_t sum[4] = {0, 0, 0, 0}; /* in registers */
    const int8_t *weight = a->weight + o * a->stride, *end = weight + a->stride, *whole = weight + (a->stride & ~15);
    next *= a->stride;
    for (; weight < whole; weight += 16) {
        codes = tile(word(weight), word(weight + next), codes, sum);
        codes = tile(word(weight + 4), word(weight + 4 + next), codes, sum);
        codes = tile(word(weight + 8), word(weight + 8 + next), codes, sum);
        codes = tile(word(weight + 12), word(weight + 12 + next), codes, sum);
    }
    for (; weight < end; weight += 4) {
        codes = tile(word(weight), word(weight + next), codes, sum);
    }
    out[0] = sum[0], out[1] = sum[1], out[2] = sum[2], out[3] = sum[3];
}

static inline int32_t scaled_s8(int32_t sum)
{
    return sum;
}
#endif

#if !DSP_S && !HELIUM_X_s8_S
/* Sum of depth products of codes by int8 weights. */
static S dot_X_S_s8(const struct product *a, int32_t row, const X *x)
{
    const int8_t *weight = a->weight + row * a->stride;
    const int32_t depth = a->depth;
    S sum = 0;
    for (int32_t i = 0; i < depth; i++) {
        sum += x[i] * weight[i];
    }
    return sum;
}
#endif
