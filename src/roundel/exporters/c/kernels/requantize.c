/* Where results go: the code of 0, and the bounds as seen from it, in which a fused activation is. */
struct codes {
    int32_t zero, floor, ceiling;
};

#include "round_R.c"

static inline int32_t requantize_R(S sum, int32_t multiplier, int32_t shift, const struct codes *to)
{
    S moved = rescale_R(sum, multiplier, shift);
    moved = moved < to->floor ? to->floor : moved;
    moved = moved > to->ceiling ? to->ceiling : moved;
    return (int32_t)moved + to->zero;
}
