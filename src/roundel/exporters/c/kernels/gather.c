/* Slices of inner codes by index, from count of them in each of outer blocks. */
struct gather {
    const int32_t *index;
    int32_t outer, count, picked, inner;
};

static void gather_X(const struct gather *a, const X *x, X *y)
{
    for (int32_t i = 0; i < a->outer; i++, x += a->count * a->inner) {
        for (int32_t j = 0; j < a->picked; j++) {
            for (int32_t k = 0; k < a->inner; k++) {
                *y++ = x[a->index[j] * a->inner + k];
            }
        }
    }
}
