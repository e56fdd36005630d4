#if DSP_S
/* Two rows of weights, next bytes apart, by two columns. */
static inline void tiles_s8(const struct product *a, int32_t o, const int8_t *weight, int32_t next, const void *columns, int32_t sum[4])
{
    const word_t *row = (const word_t *)(const void *)weight, *end = row + a->stride / 4;
    const words_t *codes = columns;
    (void)o;
    next /= 4;
    if (a->stride & 4) {
        codes = tile(row[0], row[next], codes, sum);
        row++;
    }
    while (row < end) {
        codes = tile(row[0], row[next], codes, sum);
        row++;
        codes = tile(row[0], row[next], codes, sum);
        row++;
    }
}

static inline void begin_s8(const struct product *a, void *scratch)
{
    (void)a, (void)scratch;
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
