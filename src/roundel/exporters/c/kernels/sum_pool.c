#include "requantize.c"
#include "window.c"

/* Sums over windows, rescaled; a place outside counts as 0. */
struct sum_pool {
    struct window window;
    int32_t x_zero, multiplier, shift;
    struct codes to;
};

static void sum_pool_X_Y_R(const struct sum_pool *a, const X *x, Y *y, void *scratch)
{
    const struct window *v = &a->window;
    X *ring = scratch;
    for (int32_t row = 0; row < v->out_height; row++) {
        keep_X(v, x, ring, row);
        for (int32_t place = 0; place < v->out_width; place++) {
            for (int32_t c = 0; c < v->channels; c++) {
                int32_t sum = 0;
                for (int32_t i = 0; i < v->kernel_h; i++) {
                    const X *from = row_X(v, x, ring, row * v->stride_h - v->top + i, row);
                    for (int32_t j = 0; from && j < v->kernel_w; j++) {
                        const int32_t at = place * v->stride_w - v->left + j;
                        if (at >= 0 && at < v->width) {
                            sum += from[at * v->channels + c] - a->x_zero;
                        }
                    }
                }
                *y++ = (Y)requantize_R(sum, a->multiplier, a->shift, &a->to);
            }
        }
    }
}
