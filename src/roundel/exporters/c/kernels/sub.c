#include "requantize.c"

/* Two operands in one finer unit, their difference rescaled. Steps of 0 repeat a code; the result lies in order of the loops. */
struct sub {
    int32_t n[4], a_step[4], b_step[4];
    int32_t a_zero, b_zero, left, multiplier[3], shift[3];
    struct codes to;
};

static void sub_X_Z_Y_R(const struct sub *p, const X *a, const Z *b, Y *y)
{
    const int32_t finer = (int32_t)1 << p->left;
    for (int32_t i = 0; i < p->n[0]; i++) {
        for (int32_t j = 0; j < p->n[1]; j++) {
            for (int32_t k = 0; k < p->n[2]; k++) {
                const X *from = a + i * p->a_step[0] + j * p->a_step[1] + k * p->a_step[2];
                const Z *other = b + i * p->b_step[0] + j * p->b_step[1] + k * p->b_step[2];
                for (int32_t l = 0; l < p->n[3]; l++) {
                    const int32_t one = (from[l * p->a_step[3]] - p->a_zero) * finer;
                    const int32_t two = (other[l * p->b_step[3]] - p->b_zero) * finer;
                    const int32_t sum = rescale_R(one, p->multiplier[0], p->shift[0]) - rescale_R(two, p->multiplier[1], p->shift[1]);
                    *y++ = (Y)requantize_R(sum, p->multiplier[2], p->shift[2], &p->to);
                }
            }
        }
    }
}
