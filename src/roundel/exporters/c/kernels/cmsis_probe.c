#include "cmsis_conv.c"

/* Whether the library was compiled as this file: -2 / 4 is -1 in two steps and 0 in one. */
static void cmsis_probe(int32_t wanted)
{
    static const int8_t x = -2, weight = 1;
    static const int32_t bias = 0, multiplier = 1 << 30, shift = -1;
    static const struct cmsis one = {&weight, &bias, &multiplier, &shift, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, -128, 127, 16};
    int32_t scratch[4];
    int8_t y;
    cmsis_conv(&one, &x, &y, scratch);
    if (y != wanted) {
        ROUNDEL_REFUSED();
    }
}
