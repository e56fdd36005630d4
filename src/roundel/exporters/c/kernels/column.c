#include "requantize.c"
#include "dsp.c"
#include "spread_X.c"

/* Rows of weights, one for each output, with its own bias and factor, in which the zero point of x is; stride is the bytes of a
 * row, span the codes of a column in the scratch, where columns lie abreast. Where weights are indices, levels are what they stand for
 * (dot_c4). */
struct product {
    const int8_t *weight;
    const void *bias; /* int32_t, or int64_t where sums are */
    const int32_t *multiplier;
    const int8_t *shift;
    const int16_t *levels;
    int32_t depth, stride, span, columns, level_step;
    struct codes to;
};

#if DSP_S
typedef int16_t column_X_S;

/* The scratch of a column: groups of 4 codes of all columns alternate, each in the order 0 2 1 3. */
static column_X_S *column_at_X_S(const struct product *a, void *scratch, int32_t column)
{
    column_X_S *to = (column_X_S *)scratch + 4 * column;
    for (int32_t k = (a->depth & ~3); k < a->span; k += 4) {
        column_X_S *four = to + k * a->columns;
        four[0] = four[1] = four[2] = four[3] = 0;
    }
    return to;
}

/* n codes of a column from its code k on. */
static void put_X_S(const struct product *a, column_X_S *column, int32_t k, const X *codes, int32_t n)
{
    const int32_t whole = k & 3 ? 0 : n & ~3;
    spread_X_S(column + k * a->columns, 4 * a->columns, codes, whole);
    for (int32_t i = whole; i < n; i++) {
        const int32_t at = k + i;
        column[(at >> 2) * 4 * a->columns + ((at & 1) << 1) + (at >> 1 & 1)] = codes[i];
    }
}
#else
typedef X column_X_S;

static column_X_S *column_at_X_S(const struct product *a, void *scratch, int32_t column)
{
    return (column_X_S *)scratch + column * a->span;
}

/* n codes of a column from its code k on. */
static void put_X_S(const struct product *a, column_X_S *column, int32_t k, const X *codes, int32_t n)
{
    (void)a;
#if HELIUM_X
    for (int32_t i = 0; i < n; i += 16) {
        const mve_pred16_t lanes = vctp8q((uint32_t)(n - i));
        vstrbq_p_s8(column + k + i, vldrbq_z_s8(codes + i, lanes), lanes);
    }
#else
    for (int32_t i = 0; i < n; i++) {
        column[k + i] = codes[i];
    }
#endif
}
#endif
