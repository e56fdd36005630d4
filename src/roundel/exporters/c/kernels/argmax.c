/* Index of the largest of count codes that lie step apart, the first of equals. */
struct argmax {
    int32_t outer, count, step;
};

static void argmax_X_Y(const struct argmax *a, const X *x, Y *y)
{
    for (int32_t i = 0; i < a->outer; i++, x += a->count * a->step) {
        for (int32_t j = 0; j < a->step; j++) {
            int32_t best = 0;
            for (int32_t k = 1; k < a->count; k++) {
                best = x[k * a->step + j] > x[best * a->step + j] ? k : best;
            }
            *y++ = (Y)best;
        }
    }
}
