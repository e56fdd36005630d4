#include "requantize.c"

/* The product of two operands, rescaled. Steps of 0 repeat a code; the result lies in order of the loops. */
struct mul {
    int32_t n[4], a_step[4], b_step[4];
    int32_t a_zero, b_zero, multiplier, shift;
    struct codes to;
};

static void mul_X_Z_Y_R(const struct mul *p, const X *a, const Z *b, Y *y)
{
    for (int32_t i = 0; i < p->n[0]; i++) {
        for (int32_t j = 0; j < p->n[1]; j++) {
            for (int32_t k = 0; k < p->n[2]; k++) {
                const X *from = a + i * p->a_step[0] + j * p->a_step[1] + k * p->a_step[2];
                const Z *other = b + i * p->b_step[0] + j * p->b_step[1] + k * p->b_step[2];
                for (int32_t l = 0; l < p->n[3]; l++) {
                    const int32_t product = (from[l * p->a_step[3]] - p->a_zero) * (other[l * p->b_step[3]] - p->b_zero);
                    *y++ = (Y)requantize_R(product, p->multiplier, p->shift, &p->to);
                }
            }
        }
    }
}
