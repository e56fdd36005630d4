/* Where the core multiplies pairs of 16 bits (Armv7E-M's DSP extension), columns hold 16 bits for a code, else what a code takes. */
#if defined(__ARM_FEATURE_DSP) && defined(__OPTIMIZE__) && !defined(__ARM_FEATURE_MVE)
#define DSP 1
#define APART __attribute__((noinline)) /* with registers of its own */
typedef uint32_t __attribute__((may_alias)) word_t;
typedef uint64_t __attribute__((may_alias, aligned(4))) words_t;
#else
#define DSP 0
#endif
#define DSP_s32 DSP
#define DSP_s64 0 /* sums of 64 bits */
#define DSP_s8_s8_s32 DSP /* codes, weights, sums */

/* Helium: vectors of 16 codes of 8 bits by as many weights. */
#if defined(__ARM_FEATURE_MVE)
#  include <arm_mve.h>
#define HELIUM 1
#else
#define HELIUM 0
#endif
#define HELIUM_s8 HELIUM        /* codes */
#define HELIUM_s8_s8_s32 HELIUM /* codes, weights, sums */
#define HELIUM_R2_s8 HELIUM     /* rounding, results */

#if DSP
/* 4 bytes, wherever they lie. */
static inline uint32_t word(const void *bytes)
{
    return *(const word_t *)bytes;
}

/* Bytes 0 and 2 of a word as two signed 16-bit numbers. */
static inline uint32_t even_bytes(uint32_t word)
{
    uint32_t out;
    __asm__("sxtb16 %0, %1" : "=r"(out) : "r"(word));
    return out;
}

/* Bytes 1 and 3. */
static inline uint32_t odd_bytes(uint32_t word)
{
    uint32_t out;
    __asm__("sxtb16 %0, %1, ror #8" : "=r"(out) : "r"(word));
    return out;
}

/* Two rows of 4 weights by two columns of 4 codes, which lie as even and odd codes of the first, then of the second; sums row by row.
 * One block, since compilers that order its parts anew run out of registers. */
static inline const words_t *tile(uint32_t one, uint32_t two, const words_t *codes, int32_t sum[4])
{
    uint32_t even, second, x_even, x_odd;
    __asm__("sxtb16 %[even], %[one]\n\t"
            "sxtb16 %[one], %[one], ror #8\n\t"
            "ldrd %[xe], %[xo], [%[codes]], #8\n\t"
            "sxtb16 %[second], %[two]\n\t"
            "sxtb16 %[two], %[two], ror #8\n\t"
            "smlad %[s0], %[even], %[xe], %[s0]\n\t"
            "smlad %[s2], %[second], %[xe], %[s2]\n\t"
            "smlad %[s0], %[one], %[xo], %[s0]\n\t"
            "smlad %[s2], %[two], %[xo], %[s2]\n\t"
            "ldrd %[xe], %[xo], [%[codes]], #8\n\t"
            "smlad %[s1], %[even], %[xe], %[s1]\n\t"
            "smlad %[s3], %[second], %[xe], %[s3]\n\t"
            "smlad %[s1], %[one], %[xo], %[s1]\n\t"
            "smlad %[s3], %[two], %[xo], %[s3]"
            : [codes] "+&r"(codes), [one] "+&r"(one), [two] "+&r"(two), [s0] "+&r"(sum[0]), [s1] "+&r"(sum[1]), [s2] "+&r"(sum[2]),
              [s3] "+&r"(sum[3]), [xe] "=&r"(x_even), [xo] "=&r"(x_odd), [even] "=&r"(even), [second] "=&r"(second)
            :
            : "memory");
    return codes;
}

/* One row of 4 weights, even and odd ones as pairs of 16 bits, by four columns of 4 codes. */
static inline const words_t *tile_pairs(uint32_t even, uint32_t odd, const words_t *codes, int32_t sum[4])
{
    uint32_t x, z;
    __asm__("ldrd %[x], %[z], [%[codes]], #8\n\t"
            "smlad %[s0], %[even], %[x], %[s0]\n\t"
            "smlad %[s0], %[odd], %[z], %[s0]\n\t"
            "ldrd %[x], %[z], [%[codes]], #8\n\t"
            "smlad %[s1], %[even], %[x], %[s1]\n\t"
            "smlad %[s1], %[odd], %[z], %[s1]\n\t"
            "ldrd %[x], %[z], [%[codes]], #8\n\t"
            "smlad %[s2], %[even], %[x], %[s2]\n\t"
            "smlad %[s2], %[odd], %[z], %[s2]\n\t"
            "ldrd %[x], %[z], [%[codes]], #8\n\t"
            "smlad %[s3], %[even], %[x], %[s3]\n\t"
            "smlad %[s3], %[odd], %[z], %[s3]"
            : [codes] "+&r"(codes), [s0] "+&r"(sum[0]), [s1] "+&r"(sum[1]), [s2] "+&r"(sum[2]), [s3] "+&r"(sum[3]), [x] "=&r"(x),
              [z] "=&r"(z)
            : [even] "r"(even), [odd] "r"(odd)
            : "memory");
    return codes;
}
#endif
