/* Weights are indices into 16 levels, each row's level_step after the one before. A byte holds two: of 4 weights, 0 and 2, then 1 and
 * 3. Four columns share what it costs to look them up. */
#if DSP_S
#define ROWS_c4 1
#define COLUMNS_c4 4

/* Row o of weights by four columns. */
static APART void tiles_c4(const struct product *a, int32_t o, int32_t next, const words_t *codes, int32_t out[4])
{
    int32_t sum[4] = {0, 0, 0, 0}; /* in registers */
    const int8_t *weight = a->weight + o * a->stride, *end = weight + a->stride;
    const uint16_t *levels = (const uint16_t *)a->levels + o * a->level_step;
    (void)next;
    for (; weight < end; weight += 2) {
        const uint32_t w = (uint8_t)weight[0], v = (uint8_t)weight[1];
        codes = tile_pairs(levels[w & 15] | (uint32_t)levels[w >> 4] << 16, levels[v & 15] | (uint32_t)levels[v >> 4] << 16, codes, sum);
    }
    out[0] = sum[0], out[1] = sum[1], out[2] = sum[2], out[3] = sum[3];
}

static inline int32_t scaled_c4(int32_t sum)
{
    return sum;
}
#endif

#if !DSP_S
static S dot_X_S_c4(const struct product *a, int32_t row, const X *x)
{
    const uint8_t *weight = (const uint8_t *)a->weight + row * a->stride;
    const int16_t *levels = a->levels + row * a->level_step;
    S sum = 0;
    for (int32_t i = 0; i < a->depth; i++) {
        sum += x[i] * levels[(weight[(i >> 2 << 1) + (i & 1)] >> ((i & 2) << 1)) & 15];
    }
    return sum;
}
#endif
