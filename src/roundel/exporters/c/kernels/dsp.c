/* Where the core multiplies pairs of 16 bits (Armv7E-M's DSP extension), columns hold 16 bits for a code, else what a code takes. */
#if defined(__ARM_FEATURE_DSP) && defined(__OPTIMIZE__) && !defined(__ARM_FEATURE_MVE)
#define DSP 1
typedef uint32_t __attribute__((may_alias)) word_t;
typedef uint64_t __attribute__((may_alias, aligned(4))) words_t;
#else
#define DSP 0
#endif
#define DSP_s32 DSP
#define DSP_s64 0 /* sums of 64 bits */

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

/* Two rows of 4 weights by two columns of 4 codes, which lie as even and odd codes of the first, then of the second. One block, since
 * compilers that order its parts anew run out of registers. */
static inline const words_t *tile(uint32_t one, uint32_t two, const words_t *codes, int32_t sum[4])
{
    uint32_t x_even, x_odd, z_even, z_odd, even;
    __asm__("ldrd %[xe], %[xo], [%[codes]], #8\n\t"
            "ldrd %[ze], %[zo], [%[codes]], #8\n\t"
            "sxtb16 %[even], %[one]\n\t"
            "sxtb16 %[one], %[one], ror #8\n\t"
            "smlad %[s0], %[even], %[xe], %[s0]\n\t"
            "smlad %[s1], %[even], %[ze], %[s1]\n\t"
            "sxtb16 %[even], %[two]\n\t"
            "sxtb16 %[two], %[two], ror #8\n\t"
            "smlad %[s2], %[even], %[xe], %[s2]\n\t"
            "smlad %[s3], %[even], %[ze], %[s3]\n\t"
            "smlad %[s0], %[one], %[xo], %[s0]\n\t"
            "smlad %[s1], %[one], %[zo], %[s1]\n\t"
            "smlad %[s2], %[two], %[xo], %[s2]\n\t"
            "smlad %[s3], %[two], %[zo], %[s3]"
            : [codes] "+&r"(codes), [one] "+&r"(one), [two] "+&r"(two), [s0] "+&r"(sum[0]), [s1] "+&r"(sum[1]), [s2] "+&r"(sum[2]),
              [s3] "+&r"(sum[3]), [xe] "=&r"(x_even), [xo] "=&r"(x_odd), [ze] "=&r"(z_even), [zo] "=&r"(z_odd), [even] "=&r"(even)
            :
            : "memory");
    return codes;
}

/* The same for weights that are pairs of 16 bits already: even ones, then odd ones. */
static inline const words_t *tile_pairs(uint32_t one, uint32_t one_odd, uint32_t two, uint32_t two_odd, const words_t *codes,
                                        int32_t sum[4])
{
    uint32_t x, z;
    __asm__("ldr %[x], [%[codes], #0]\n\t"
            "ldr %[z], [%[codes], #8]\n\t"
            "smlad %[s0], %[one], %[x], %[s0]\n\t"
            "smlad %[s1], %[one], %[z], %[s1]\n\t"
            "smlad %[s2], %[two], %[x], %[s2]\n\t"
            "smlad %[s3], %[two], %[z], %[s3]"
            : [s0] "+&r"(sum[0]), [s1] "+&r"(sum[1]), [s2] "+&r"(sum[2]), [s3] "+&r"(sum[3]), [x] "=&r"(x), [z] "=&r"(z)
            : [codes] "r"(codes), [one] "r"(one), [two] "r"(two)
            : "memory");
    __asm__("ldr %[x], [%[codes], #4]\n\t"
            "ldr %[z], [%[codes], #12]\n\t"
            "smlad %[s0], %[one], %[x], %[s0]\n\t"
            "smlad %[s1], %[one], %[z], %[s1]\n\t"
            "smlad %[s2], %[two], %[x], %[s2]\n\t"
            "smlad %[s3], %[two], %[z], %[s3]"
            : [s0] "+&r"(sum[0]), [s1] "+&r"(sum[1]), [s2] "+&r"(sum[2]), [s3] "+&r"(sum[3]), [x] "=&r"(x), [z] "=&r"(z)
            : [codes] "r"(codes), [one] "r"(one_odd), [two] "r"(two_odd)
            : "memory");
    return codes + 2;
}
#endif
