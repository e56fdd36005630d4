#include "dsp.c"

/* Windows over rows of places of channels. kept is 0, or how many rows a ring keeps because the result is written over them. */
struct window {
    int32_t height, width, channels, out_height, out_width;
    int32_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, top, left;
    int32_t kept;
};

/* Before row y of the result is written: keep the rows that it may overwrite. */
static void keep_X(const struct window *v, const X *x, X *ring, int32_t y)
{
    const int32_t row = v->width * v->channels;
    if (v->kept > 0) {
        for (int32_t r = y * v->stride_h; r < (y + 1) * v->stride_h && r < v->height; r++) {
            const X *from = x + r * row;
            X *to = ring + r % v->kept * row;
            int32_t i = 0;
#if DSP
            for (const int32_t four = 4 / (int32_t)sizeof(X); i + four <= row; i += four) {
                *(word_t *)(void *)(to + i) = word(from + i);
            }
#endif
            for (; i < row; i++) {
                to[i] = from[i];
            }
        }
    }
}

/* Row r as it was, for row y of the result; null outside. */
static const X *row_X(const struct window *v, const X *x, const X *ring, int32_t r, int32_t y)
{
    const int32_t row = v->width * v->channels;
    if (r < 0 || r >= v->height) {
        return 0;
    }
    return v->kept > 0 && r < (y + 1) * v->stride_h ? ring + r % v->kept * row : x + r * row;
}
