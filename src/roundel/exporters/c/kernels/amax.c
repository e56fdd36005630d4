/* Largest code over some axes: n and step of those that stay, over and stride of those that are searched. */
struct amax {
    int32_t n[4], step[4], over[4], stride[4];
};

static X largest_X(const struct amax *a, const X *x)
{
    X best = *x;
    for (int32_t i = 0; i < a->over[0]; i++) {
        for (int32_t j = 0; j < a->over[1]; j++) {
            for (int32_t k = 0; k < a->over[2]; k++) {
                for (int32_t l = 0; l < a->over[3]; l++) {
                    const X code = x[i * a->stride[0] + j * a->stride[1] + k * a->stride[2] + l * a->stride[3]];
                    best = code > best ? code : best;
                }
            }
        }
    }
    return best;
}

static void amax_X(const struct amax *a, const X *x, X *y)
{
    for (int32_t i = 0; i < a->n[0]; i++) {
        for (int32_t j = 0; j < a->n[1]; j++) {
            for (int32_t k = 0; k < a->n[2]; k++) {
                for (int32_t l = 0; l < a->n[3]; l++) {
                    *y++ = largest_X(a, x + i * a->step[0] + j * a->step[1] + k * a->step[2] + l * a->step[3]);
                }
            }
        }
    }
}
