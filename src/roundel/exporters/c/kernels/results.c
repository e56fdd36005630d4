#include "requantize.c"
#include "dsp.c"

#if HELIUM
/* The codes of n sums, up to 4, that lie side by side, each with its own bias. */
static inline void results_Y_R(const S *sum, const S *bias, int32_t n, const int32_t *multiplier, const int8_t *shift,
                               const struct codes *to, Y *y)
{
#if HELIUM_R_Y
    if (n == 4 && vmaxvq_s32(-128, vldrbq_s32(shift)) < -1) { /* as the rule has it for shifts of -2 and less */
        const int32x4_t high = vmulhq_s32(vaddq_s32(vldrwq_s32(sum), vldrwq_s32(bias)), vldrwq_s32(multiplier));
        const int32x4_t moved = vmaxq_s32(vrshlq_s32(high, vaddq_n_s32(vldrbq_s32(shift), 1)), vdupq_n_s32(to->floor));
        vstrbq_s32(y, vaddq_n_s32(vminq_s32(moved, vdupq_n_s32(to->ceiling)), to->zero));
        return;
    }
#endif
    for (int32_t i = 0; i < n; i++) {
        y[i] = (Y)requantize_R(sum[i] + bias[i], multiplier[i], shift[i], to);
    }
}
#endif
