#include "requantize.c"
#include "dsp.c"
#include "window.c"
#if HELIUM_X_V_S
#include "results.c"
#endif

/* Convolution in which every channel stands alone and makes one output; weights [kernel_h][kernel_w][channel], the zero point of x
 * in the bias; zeros stand for the places of a tap outside. At most 49 taps. */
struct depthwise {
    const void *weight;
    const void *bias; /* int32_t, or int64_t where sums are */
    const int32_t *multiplier;
    const int8_t *shift;
    struct window window;
    const void *zeros;
    struct codes to;
};

/* Where the codes under each tap start. */
static void taps_X(const struct window *v, const X *x, const X *ring, const X *zeros, int32_t y, int32_t place, const X **tap)
{
    for (int32_t i = 0; i < v->kernel_h; i++) {
        const X *row = row_X(v, x, ring, y * v->stride_h - v->top + i * v->dilation_h, y);
        for (int32_t j = 0; j < v->kernel_w; j++) {
            const int32_t at = place * v->stride_w - v->left + j * v->dilation_w;
            *tap++ = row && at >= 0 && at < v->width ? row + at * v->channels : zeros;
        }
    }
}

#if DSP_X_V_S
/* Sums of 4 channels from c on. */
static APART void four_X_V(const X **tap, int32_t c, int32_t taps, const V *weight, int32_t step, const int32_t *bias, int32_t out[4])
{
    int32_t s0 = bias[0], s1 = bias[1], s2 = bias[2], s3 = bias[3];
    for (const X **end = tap + taps; tap < end; tap++, weight += step) {
        const uint32_t x = word(*tap + c), w = word(weight);
        const uint32_t x_even = even_bytes(x), x_odd = odd_bytes(x), w_even = even_bytes(w), w_odd = odd_bytes(w);
        s0 += (int16_t)x_even * (int16_t)w_even;
        s1 += (int16_t)x_odd * (int16_t)w_odd;
        s2 += ((int32_t)x_even >> 16) * ((int32_t)w_even >> 16);
        s3 += ((int32_t)x_odd >> 16) * ((int32_t)w_odd >> 16);
    }
    out[0] = s0, out[1] = s1, out[2] = s2, out[3] = s3;
}
#endif

static void depthwise_X_V_Y_R(const struct depthwise *a, const X *x, Y *y, void *scratch)
{
    const struct window *v = &a->window;
    const int32_t channels = v->channels, taps = v->kernel_h * v->kernel_w;
    const struct codes to = a->to;
    X *ring = scratch;
    const X *tap[49];
    for (int32_t row = 0; row < v->out_height; row++) {
        keep_X(v, x, ring, row);
        for (int32_t place = 0; place < v->out_width; place++, y += channels) {
            int32_t done = 0;
            taps_X(v, x, ring, a->zeros, row, place, tap);
#if HELIUM_X_V_S
            for (int32_t c = 0; c + 8 <= channels; c += 8, done += 8) {
                const V *weight = (const V *)a->weight + c;
                int32x4x2_t both = {{vdupq_n_s32(0), vdupq_n_s32(0)}}; /* sums of even and of odd channels */
                int32_t sum[8];
                for (int32_t t = 0; t < taps; t++, weight += channels) {
                    const int16x8_t codes = vldrbq_s16(tap[t] + c), w = vldrbq_s16(weight);
                    both.val[0] = vaddq_s32(both.val[0], vmullbq_int_s16(codes, w));
                    both.val[1] = vaddq_s32(both.val[1], vmulltq_int_s16(codes, w));
                }
                vst2q_s32(sum, both);
                for (int32_t i = 0; i < 8; i += 4) {
                    results_Y_R(sum + i, (const S *)a->bias + c + i, 4, a->multiplier + c + i, a->shift + c + i, &to, y + c + i);
                }
            }
#endif
#if DSP_X_V_S
            const V *weight = a->weight;
            const int32_t *bias = a->bias, *multiplier = a->multiplier;
            const int8_t *shift = a->shift;
            for (; done + 4 <= channels; done += 4, weight += 4, bias += 4, multiplier += 4, shift += 4) {
                int32_t sum[4];
                four_X_V(tap, done, taps, weight, channels, bias, sum);
                y[done] = (Y)requantize_R(sum[0], multiplier[0], shift[0], &to);
                y[done + 1] = (Y)requantize_R(sum[1], multiplier[1], shift[1], &to);
                y[done + 2] = (Y)requantize_R(sum[2], multiplier[2], shift[2], &to);
                y[done + 3] = (Y)requantize_R(sum[3], multiplier[3], shift[3], &to);
            }
#endif
            for (int32_t c = done; c + 4 <= channels; c += 4) {
                const V *weight = (const V *)a->weight + c;
                const S *bias = (const S *)a->bias + c;
                S sum[4] = {bias[0], bias[1], bias[2], bias[3]};
                for (int32_t t = 0; t < taps; t++, weight += channels) {
                    const X *codes = tap[t] + c;
                    sum[0] += codes[0] * weight[0];
                    sum[1] += codes[1] * weight[1];
                    sum[2] += codes[2] * weight[2];
                    sum[3] += codes[3] * weight[3];
                }
                for (int32_t i = 0; i < 4; i++) {
                    y[c + i] = (Y)requantize_R(sum[i], a->multiplier[c + i], a->shift[c + i], &to);
                }
            }
            for (int32_t c = channels & ~3; c < channels; c++) {
                S sum = ((const S *)a->bias)[c];
                for (int32_t t = 0; t < taps; t++) {
                    sum += tap[t][c] * ((const V *)a->weight)[t * channels + c];
                }
                y[c] = (Y)requantize_R(sum, a->multiplier[c], a->shift[c], &to);
            }
        }
    }
}
