#include "product.c"

/* Transposed convolution: the codes that reach a place are gathered into a column, zeros where a tap meets none. */
struct conv_transpose {
    struct product product;
    const void *zeros;
    int32_t height, width, channels, out_height, out_width, kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, top, left;
    int32_t groups, outputs;
};

static void reach_X_S(const struct conv_transpose *a, const X *x, int32_t row, int32_t place, int32_t group, column_X_S *column)
{
    const int32_t channels = a->channels / a->groups;
    int32_t k = 0;
    for (int32_t i = 0; i < a->kernel_h; i++) {
        const int32_t y = row + a->top - i * a->dilation_h;
        for (int32_t j = 0; j < a->kernel_w; j++, k += channels) {
            const int32_t z = place + a->left - j * a->dilation_w;
            const int32_t meets = y >= 0 && y % a->stride_h == 0 && y / a->stride_h < a->height && z >= 0 && z % a->stride_w == 0
                && z / a->stride_w < a->width;
            const int32_t at = (y / a->stride_h * a->width + z / a->stride_w) * a->channels + group * channels;
            put_X_S(&a->product, column, k, meets ? x + at : a->zeros, channels);
        }
    }
}

static void conv_transpose_X_Y_R_W(const struct conv_transpose *a, const X *x, Y *y, void *scratch)
{
    const int32_t outputs = a->outputs / a->groups;
    for (int32_t row = 0; row < a->out_height; row++) {
        for (int32_t place = 0; place < a->out_width; place++, y += a->outputs) {
            for (int32_t group = 0; group < a->groups; group++) {
                const int32_t first = group * outputs;
                reach_X_S(a, x, row, place, group, column_at_X_S(&a->product, scratch, 0));
                product_X_Y_R_W(&a->product, first, first + outputs, scratch, 1, y + first, a->outputs);
            }
        }
    }
}
