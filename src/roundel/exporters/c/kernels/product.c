#include "column.c"
#include "dot_W.c"

/* Outputs first .. last - 1 for one or two columns; the results of the second lie step further. */
#if DSP_S
static void product_X_Y_R_W(const struct product *a, int32_t first, int32_t last, const void *columns, int32_t count, Y *y, int32_t step)
{
    const int32_t *bias = (const int32_t *)a->bias + first, *multiplier = a->multiplier + first;
    const int8_t *shift = a->shift + first, *weight = a->weight + first * a->stride;
    const int32_t stride = a->stride;
    const struct codes to = a->to;
    for (int32_t o = first; o < last; o += 2, weight += 2 * stride, bias += 2, multiplier += 2, shift += 2, y += 2) {
        const int32_t next = o + 1 < last ? stride : 0;
        int32_t sum[4] = {0, 0, 0, 0};
        tiles_W(a, o, weight, next, columns, sum);
        y[0] = (Y)requantize_R(bias[0] + scaled_W(sum[0]), multiplier[0], shift[0], &to);
        if (count > 1) {
            y[step] = (Y)requantize_R(bias[0] + scaled_W(sum[1]), multiplier[0], shift[0], &to);
        }
        if (!next) {
            break;
        }
        y[1] = (Y)requantize_R(bias[1] + scaled_W(sum[2]), multiplier[1], shift[1], &to);
        if (count > 1) {
            y[step + 1] = (Y)requantize_R(bias[1] + scaled_W(sum[3]), multiplier[1], shift[1], &to);
        }
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
