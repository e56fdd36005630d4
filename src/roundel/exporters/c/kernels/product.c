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
    const int32_t *bias = a->bias;
    for (int32_t o = first; o < last; o += 4) {
        const int32_t n = last - o < 4 ? last - o : 4;
        const int8_t *rows = a->weight + o * a->stride;
        for (int32_t i = 0; i < count; i++) {
            const int8_t *x = (const int8_t *)columns + i * a->span;
            const int8_t *one = rows, *two = n > 1 ? one + a->stride : one, *three = n > 2 ? two + a->stride : two;
            const int8_t *four = n > 3 ? three + a->stride : three;
            int32_t sum[4] = {0, 0, 0, 0}, left = a->depth;
            for (; left >= 16; left -= 16, one += 16, two += 16, three += 16, four += 16, x += 16) {
                const int8x16_t codes = vldrbq_s8(x);
                sum[0] = vmladavaq_s8(sum[0], codes, vldrbq_s8(one));
                sum[1] = vmladavaq_s8(sum[1], codes, vldrbq_s8(two));
                sum[2] = vmladavaq_s8(sum[2], codes, vldrbq_s8(three));
                sum[3] = vmladavaq_s8(sum[3], codes, vldrbq_s8(four));
            }
            if (left > 0) {
                const mve_pred16_t lanes = vctp8q((uint32_t)left); /* weights past the end are 0, whatever the column holds there */
                const int8x16_t codes = vldrbq_s8(x);
                sum[0] = vmladavaq_s8(sum[0], codes, vldrbq_z_s8(one, lanes));
                sum[1] = vmladavaq_s8(sum[1], codes, vldrbq_z_s8(two, lanes));
                sum[2] = vmladavaq_s8(sum[2], codes, vldrbq_z_s8(three, lanes));
                sum[3] = vmladavaq_s8(sum[3], codes, vldrbq_z_s8(four, lanes));
            }
            for (int32_t k = 0; k < n; k++) {
                sum[k] += bias[o + k];
            }
            results_Y_R(sum, n, a->multiplier + o, a->shift + o, &a->to, y + i * step + o - first);
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
