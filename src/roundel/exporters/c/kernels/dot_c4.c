/* Weights are indices into 16 levels, each row's level_step after the one before. A byte holds two: of 4 weights, 0 and 2, then 1 and
 * 3. Where all rows share their levels, the scratch begins with both levels of every byte, as two 16-bit numbers. */
#if DSP_S
static void begin_c4(const struct product *a, void *scratch)
{
    word_t *pairs = scratch;
    for (int32_t byte = 0; byte < 256 && !a->level_step; byte++) {
        pairs[byte] = (uint32_t)(uint16_t)a->levels[byte & 15] | (uint32_t)(uint16_t)a->levels[byte >> 4] << 16;
    }
}

static inline uint32_t pair_c4(const int16_t *levels, uint32_t byte)
{
    return (uint32_t)(uint16_t)levels[byte & 15] | (uint32_t)(uint16_t)levels[byte >> 4] << 16;
}

/* Rows o and o + 1 of weights, next bytes apart, by two columns. */
static inline void tiles_c4(const struct product *a, int32_t o, const int8_t *weight, int32_t next, const void *columns, int32_t sum[4])
{
    const uint8_t *row = (const uint8_t *)weight, *end = row + a->stride;
    const word_t *pairs = (const word_t *)columns - 256;
    const int16_t *levels = a->levels + o * a->level_step, *others = next ? levels + a->level_step : levels;
    const words_t *codes = columns;
    if (!a->level_step) {
        for (; row < end; row += 2) {
            codes = tile_pairs(pairs[row[0]], pairs[row[1]], pairs[row[next]], pairs[row[next + 1]], codes, sum);
        }
    }
    for (; row < end; row += 2) {
        const uint32_t one = pair_c4(levels, row[0]), odd = pair_c4(levels, row[1]);
        codes = tile_pairs(one, odd, pair_c4(others, row[next]), pair_c4(others, row[next + 1]), codes, sum);
    }
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
