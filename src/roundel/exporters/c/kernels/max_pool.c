#include "window.c"

/* Largest code under each window, clamped; places outside never win. */
struct max_pool {
    struct window window;
    int32_t low, high;
};

static void max_pool_X_Y(const struct max_pool *a, const X *x, Y *y, void *scratch)
{
    const struct window *v = &a->window;
    X *ring = scratch;
    for (int32_t row = 0; row < v->out_height; row++) {
        keep_X(v, x, ring, row);
        for (int32_t place = 0; place < v->out_width; place++) {
            for (int32_t c = 0; c < v->channels; c++) {
                int32_t best = a->low;
                for (int32_t i = 0; i < v->kernel_h; i++) {
                    const X *from = row_X(v, x, ring, row * v->stride_h - v->top + i * v->dilation_h, row);
                    for (int32_t j = 0; from && j < v->kernel_w; j++) {
                        const int32_t at = place * v->stride_w - v->left + j * v->dilation_w;
                        if (at >= 0 && at < v->width && from[at * v->channels + c] > best) {
                            best = from[at * v->channels + c];
                        }
                    }
                }
                *y++ = (Y)(best > a->high ? a->high : best);
            }
        }
    }
}
