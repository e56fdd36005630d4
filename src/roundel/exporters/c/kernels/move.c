/* Codes to other places: from and to are the steps of the loops. */
struct move {
    int32_t n[5], from[5], to[5];
};

static void move_X(const struct move *a, const X *x, X *y)
{
    for (int32_t i = 0; i < a->n[0]; i++) {
        for (int32_t j = 0; j < a->n[1]; j++) {
            for (int32_t k = 0; k < a->n[2]; k++) {
                for (int32_t l = 0; l < a->n[3]; l++) {
                    const X *from = x + i * a->from[0] + j * a->from[1] + k * a->from[2] + l * a->from[3];
                    X *to = y + i * a->to[0] + j * a->to[1] + k * a->to[2] + l * a->to[3];
                    for (int32_t m = 0; m < a->n[4]; m++) {
                        to[m * a->to[4]] = from[m * a->from[4]];
                    }
                }
            }
        }
    }
}
