#include "column.c"
#include "dot_W.c"

/* Outputs first .. last - 1 for count columns; the results of a column lie step after those of the one before. */
#if DSP_S
static void product_X_Y_R_W(const struct product *a, int32_t first, int32_t last, const void *columns, int32_t count, Y *y, int32_t step)
{
    const int32_t *bias = (const int32_t *)a->bias + first, *multiplier = a->multiplier + first;
    const int8_t *shift = a->shift + first;
    const int32_t at[4] = {0, count > 1 ? step : 0, count > 2 ? 2 * step : 0, count > 3 ? 3 * step : 0};
    const struct codes to = a->to;
    for (int32_t left = last - first; left > 0; left -= ROWS_W) {
        const int32_t next = left > 1 ? ROWS_W - 1 : 0; /* where there is no second row or column, the first is written over it */
        int32_t sum[4], start = bias[next], factor = multiplier[next], by = shift[next];
        tiles_W(a, last - left, next, columns, sum);
        y[next + at[3 % COLUMNS_W]] = (Y)requantize_R(start + scaled_W(sum[3]), factor, by, &to);
        y[next + at[2 % COLUMNS_W]] = (Y)requantize_R(start + scaled_W(sum[2]), factor, by, &to);
        start = *bias, factor = *multiplier, by = *shift;
        y[at[1]] = (Y)requantize_R(start + scaled_W(sum[1]), factor, by, &to);
        y[0] = (Y)requantize_R(start + scaled_W(sum[0]), factor, by, &to);
        bias += ROWS_W, multiplier += ROWS_W, shift += ROWS_W, y += ROWS_W;
    }
}
#elif HELIUM_X_W_S
#include "results.c"
static void product_X_Y_R_W(const struct product *a, int32_t first, int32_t last, const void *columns, int32_t count, Y *y, int32_t step)
{
    const mve_pred16_t lanes = vctp8q((uint32_t)a->depth & 15u);
    const int32_t stride = a->stride, *bias = a->bias;
    for (int32_t o = first; o < last; o += 4) {
        const int32_t n = last - o < 4 ? last - o : 4;
        const int8_t *rows = a->weight + o * stride;
        for (int32_t i = 0; i < count; i++) {
            const int8_t *x = (const int8_t *)columns + i * a->span;
            const int8_t *w0 = rows, *w1 = n > 1 ? w0 + stride : w0, *w2 = n > 2 ? w1 + stride : w1, *w3 = n > 3 ? w2 + stride : w2;
            int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
            for (int32_t k = a->depth >> 4; k > 0; k--, w0 += 16, w1 += 16, w2 += 16, w3 += 16, x += 16) {
                const int8x16_t codes = vldrbq_s8(x);
                s0 = vmladavaq_s8(s0, codes, vldrbq_s8(w0));
                s1 = vmladavaq_s8(s1, codes, vldrbq_s8(w1));
                s2 = vmladavaq_s8(s2, codes, vldrbq_s8(w2));
                s3 = vmladavaq_s8(s3, codes, vldrbq_s8(w3));
            }
            if (a->depth & 15) { /* weights past the end are 0, whatever the column holds there */
                const int8x16_t codes = vldrbq_s8(x);
                s0 = vmladavaq_s8(s0, codes, vldrbq_z_s8(w0, lanes));
                s1 = vmladavaq_s8(s1, codes, vldrbq_z_s8(w1, lanes));
                s2 = vmladavaq_s8(s2, codes, vldrbq_z_s8(w2, lanes));
                s3 = vmladavaq_s8(s3, codes, vldrbq_z_s8(w3, lanes));
            }
            const int32_t sum[4] = {s0, s1, s2, s3};
            results_Y_R(sum, bias + o, n, a->multiplier + o, a->shift + o, &a->to, y + i * step + o - first);
        }
    }
}
#else
static void product_X_Y_R_W(const struct product *a, int32_t first, int32_t last, const void *columns, int32_t count, Y *y, int32_t step)
{
    const X *x = columns;
    for (int32_t i = 0; i < count; i++, x += a->span) {
        for (int32_t o = first; o < last; o++) {
            const S sum = ((const S *)a->bias)[o] + dot_X_S_W(a, o, x);
            y[i * step + o - first] = (Y)requantize_R(sum, a->multiplier[o], a->shift[o], &a->to);
        }
    }
}
#endif
