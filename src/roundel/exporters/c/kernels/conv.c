#include "product.c"
#include "window.c"

/* Convolution, grouped or not: the codes under each window are gathered into a column. zeros stand for the places of a tap outside;
 * columns is how many bytes come before the ring in the scratch. */
struct conv {
    struct product product;
    struct window window;
    const void *zeros;
    int32_t groups, outputs, columns;
};

static void window_X_S(const struct conv *a, const X *x, const X *ring, int32_t y, int32_t place, int32_t group, column_X_S *column)
{
    const struct window *v = &a->window;
    const int32_t channels = v->channels / a->groups;
    int32_t k = 0;
    for (int32_t i = 0; i < v->kernel_h; i++) {
        const X *row = row_X(v, x, ring, y * v->stride_h - v->top + i * v->dilation_h, y);
        for (int32_t j = 0; j < v->kernel_w; j++, k += channels) {
            const int32_t at = place * v->stride_w - v->left + j * v->dilation_w;
            const int32_t inside = row && at >= 0 && at < v->width;
            put_X_S(column, k, inside ? row + at * v->channels + group * channels : a->zeros, channels);
        }
    }
}

static void conv_X_Y_R_W(const struct conv *a, const X *x, Y *y, void *scratch)
{
    const int32_t outputs = a->outputs / a->groups;
    void *columns = (char *)scratch + a->product.lead;
    X *ring = (X *)(void *)((char *)scratch + a->columns);
#if DSP_S
    begin_W(&a->product, scratch);
#endif
    for (int32_t row = 0; row < a->window.out_height; row++) {
        keep_X(&a->window, x, ring, row);
        for (int32_t place = 0; place < a->window.out_width; place += 2, y += 2 * a->outputs) {
            const int32_t count = place + 1 < a->window.out_width ? 2 : 1;
            for (int32_t group = 0; group < a->groups; group++) {
                const int32_t first = group * outputs;
                for (int32_t i = 0; i < count; i++) {
                    window_X_S(a, x, ring, row, place + i, group, column_at_X_S(&a->product, columns, i));
                }
                product_X_Y_R_W(&a->product, first, first + outputs, columns, count, y + first, a->outputs);
            }
        }
        y -= a->window.out_width % 2 * a->outputs;
    }
}
