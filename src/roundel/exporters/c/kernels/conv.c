#include "product.c"
#include "window.c"

/* Convolution, grouped or not: the codes under each window are gathered into a column. zeros stand for the places of a tap outside;
 * before is how many bytes of the scratch come before the ring. */
struct conv {
    struct product product;
    struct window window;
    const void *zeros;
    int32_t groups, outputs, before;
};

static void window_X_S(const struct conv *a, const X *x, const X *ring, int32_t y, int32_t place, int32_t group, column_X_S *column)
{
    const struct window *v = &a->window;
    const int32_t channels = v->channels / a->groups, first = place * v->stride_w - v->left;
    const int32_t joined = a->groups == 1 && v->dilation_w == 1; /* the codes of neighbouring taps lie side by side */
    int32_t k = 0;
    for (int32_t i = 0; i < v->kernel_h; i++) {
        const X *row = row_X(v, x, ring, y * v->stride_h - v->top + i * v->dilation_h, y);
        for (int32_t j = 0, taps; j < v->kernel_w; j += taps, k += taps * channels) {
            const int32_t at = first + j * v->dilation_w, inside = row && at >= 0 && at < v->width;
            taps = !inside || !joined ? 1 : v->kernel_w - j < v->width - at ? v->kernel_w - j : v->width - at;
            put_X_S(&a->product, column, k, inside ? row + at * v->channels + group * channels : a->zeros, taps * channels);
        }
    }
}

static void conv_X_Y_R_W(const struct conv *a, const X *x, Y *y, void *scratch)
{
    const int32_t outputs = a->outputs / a->groups, groups = a->groups, height = a->window.out_height, width = a->window.out_width;
    X *ring = (X *)(void *)((char *)scratch + a->before);
    int32_t count = 0; /* columns that are filled; they go on from row to row where there is one group */
    for (int32_t row = 0; row < height; row++) {
        keep_X(&a->window, x, ring, row);
        for (int32_t place = 0; place < width; place++) {
            if (groups == 1) {
                window_X_S(a, x, ring, row, place, 0, column_at_X_S(&a->product, scratch, count));
            }
            if (++count < a->product.columns && (place + 1 < width || (groups == 1 && row + 1 < height))) {
                continue;
            }
            for (int32_t group = 0; group < groups; group++) {
                const int32_t first = group * outputs;
                for (int32_t i = 0; groups > 1 && i < count; i++) {
                    window_X_S(a, x, ring, row, place + 1 - count + i, group, column_at_X_S(&a->product, scratch, i));
                }
                product_X_Y_R_W(&a->product, first, first + outputs, scratch, count, y + first, a->outputs);
            }
            y += count * a->outputs;
            count = 0;
        }
    }
}
