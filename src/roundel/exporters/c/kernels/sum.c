#include "requantize.c"

/* Sums over some axes: n and step of those that stay, over and stride of those that are summed. */
struct sum {
    int32_t n[4], step[4], over[4], stride[4];
    int32_t x_zero, multiplier, shift;
    struct codes to;
};

static int32_t total_X(const struct sum *a, const X *x)
{
    int32_t sum = 0;
    for (int32_t i = 0; i < a->over[0]; i++) {
        for (int32_t j = 0; j < a->over[1]; j++) {
            for (int32_t k = 0; k < a->over[2]; k++) {
                for (int32_t l = 0; l < a->over[3]; l++) {
                    sum += x[i * a->stride[0] + j * a->stride[1] + k * a->stride[2] + l * a->stride[3]] - a->x_zero;
                }
            }
        }
    }
    return sum;
}

static void sum_X_Y_R(const struct sum *a, const X *x, Y *y)
{
    for (int32_t i = 0; i < a->n[0]; i++) {
        for (int32_t j = 0; j < a->n[1]; j++) {
            for (int32_t k = 0; k < a->n[2]; k++) {
                for (int32_t l = 0; l < a->n[3]; l++) {
                    const int32_t sum = total_X(a, x + i * a->step[0] + j * a->step[1] + k * a->step[2] + l * a->step[3]);
                    *y++ = (Y)requantize_R(sum, a->multiplier, a->shift, &a->to);
                }
            }
        }
    }
}
